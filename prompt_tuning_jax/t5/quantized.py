"""Stores a frozen base model in 8 bits: every matrix as int8, with one float32 scale per output.

A matrix keeps its path, and its scales are beside it: `.../kernel` [in, out] and `.../kernel_scale` [out], or
`token_embedder/embedding` [V, D] and `token_embedder/embedding_scale` [V]. Norms and position biases stay floats. A
matmul casts its matrix to the activations' dtype just before it needs it; see `kernels.quantized_matmul`.

Two libraries were not used. Qwix's matmul casts the whole matrix to float32 and keeps that for the backward pass, so
that every step has a float copy of the base model in memory; and it leaves embedding tables as they are. AQT renames
the parameters, and first needs the whole model in floats.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

TABLE = "token_embedder/embedding"
LARGEST = 127  # symmetric: -128 is not used


def output_axis(path: str) -> int | None:
    """Returns the axis of the outputs of the matrix at `path` (of the table: tokens); None for what stays float."""
    if path == TABLE:
        return 0
    return 1 if path.endswith("/kernel") else None


def scale_path(path: str) -> str:
    """Returns the path of the scales of the matrix at `path`."""
    return f"{path}_scale"


def quantized(path: str, array: Array) -> dict[str, Array]:
    """Returns what an int8 base model stores for the parameter at `path`: a matrix and its scales, or the array itself.

    The scale of an output is its largest magnitude divided by 127, so the error of an entry is at most half a scale.
    """
    axis = output_axis(path)
    if axis is None:
        return {path: array}
    values, scale = _quantize(array, axis)
    return {path: values, scale_path(path): scale}


@jax.jit(static_argnames="axis")
def _quantize(matrix: Float[Array, "a b"], axis: int) -> tuple[Int8[Array, "a b"], Float[Array, " outputs"]]:
    matrix = matrix.astype(jnp.float32)
    # An output whose weights are all 0 must not divide by 0.
    largest = jnp.max(jnp.abs(matrix), axis=1 - axis, keepdims=True)
    scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
    values = jnp.clip(jnp.round(matrix / scale), -LARGEST, LARGEST)
    return values.astype(jnp.int8), scale.reshape(-1)


def embedding_table(params: Mapping[str, Array]) -> Float[Array, "V D"]:
    """Returns the embedding table of a base model in floats; in float32 if the base model is int8."""
    table = params[TABLE]
    scale = params.get(scale_path(TABLE))
    return table if scale is None else table.astype(jnp.float32) * scale[:, None]


def embedding_rows(params: Mapping[str, Array], ids: Int[np.ndarray, " n"]) -> Float[Array, "n D"]:
    """Returns rows of a base model's embedding table in floats, as `embedding_table(params)[ids]`."""
    rows = params[TABLE][ids]
    scale = params.get(scale_path(TABLE))
    return rows if scale is None else rows.astype(jnp.float32) * scale[ids][:, None]

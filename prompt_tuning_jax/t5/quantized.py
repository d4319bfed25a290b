"""A frozen base in 8 bits: every matrix as int8, with one float32 scale for each of its outputs.

A matrix stays at its path, and its scales stand beside it: `.../kernel` [in, out] and `.../kernel_scale` [out], or
`token_embedder/embedding` [V, D] and `token_embedder/embedding_scale` [V]. Norms and position biases stay floats.
A product turns its matrix into the activations' dtype where it is needed; see `kernels.quantized_product`.

Not by Qwix, whose product turns the whole matrix to float32 and keeps that for the backward pass, a float copy of the
base in every step, and which leaves embedding tables as they are; nor by AQT, which renames the parameters and converts
a model that is there in floats first.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

TABLE = "token_embedder/embedding"
LARGEST = 127  # symmetric: -128 is not used


def output_axis(path: str) -> int | None:
    """The axis of the outputs of the matrix at `path`: the words of the embedding table; None for what stays float."""
    if path == TABLE:
        return 0
    return 1 if path.endswith("/kernel") else None


def scale_path(path: str) -> str:
    """Where the scales of the matrix at `path` stand."""
    return f"{path}_scale"


def quantized(path: str, array: Array) -> dict[str, Array]:
    """The parameter at `path` as an int8 base holds it: a matrix and its scales, or the array as it is.

    A scale is the largest magnitude of its output over 127; every entry is then within half a scale of its own value.
    """
    axis = output_axis(path)
    if axis is None:
        return {path: array}
    values, scale = _quantize(array, axis)
    return {path: values, scale_path(path): scale}


@jax.jit(static_argnames="axis")
def _quantize(matrix: Float[Array, "a b"], axis: int) -> tuple[Int8[Array, "a b"], Float[Array, " outputs"]]:
    matrix = matrix.astype(jnp.float32)
    # No output without a weight divides by 0.
    largest = jnp.max(jnp.abs(matrix), axis=1 - axis, keepdims=True)
    scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
    values = jnp.clip(jnp.round(matrix / scale), -LARGEST, LARGEST)
    return values.astype(jnp.int8), scale.reshape(-1)


def embedding_table(params: Mapping[str, Array]) -> Float[Array, "V D"]:
    """The embedding table of a base, in floats: of an int8 base, in float32."""
    table = params[TABLE]
    scale = params.get(scale_path(TABLE))
    return table if scale is None else table.astype(jnp.float32) * scale[:, None]


def embedding_rows(params: Mapping[str, Array], ids: Int[np.ndarray, " n"]) -> Float[Array, "n D"]:
    """Returns rows of a base model's embedding table in floats, as `embedding_table(params)[ids]`."""
    rows = params[TABLE][ids]
    scale = params.get(scale_path(TABLE))
    return rows if scale is None else rows.astype(jnp.float32) * scale[ids][:, None]

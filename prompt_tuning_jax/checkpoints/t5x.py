"""Infers the size of the model in a T5X checkpoint, and writes models that T5X restores, in either of its layouts."""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from prompt_tuning_jax.array_files import t5x
from prompt_tuning_jax.array_files.atomic_folder import atomic_folder
from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tokenizers.vocabulary import write_vocabulary

Arrays = Mapping[str, ArrayLike | StoredArray]
Part = tuple[Any, ...]  # an array's name, and the start and end along each axis of the part
STACKED = re.compile(r"(encoder|decoder)/\1/(.+)")
ATTENTION_KERNEL = re.compile(r"(?:encoder|decoder)/layers_\d+/\w*attention/(query|key|value|out)/kernel")


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> T5Config | None:
    """Returns the size of the model with parameters of these shapes; None if too many are missing to infer it.

    No T5X file has the largest distance of the relative positions; T5's default of 128 is assumed.
    """
    try:
        vocab_size, emb_dim = shapes["token_embedder/embedding"]
        per_layer = "encoder/layers_0/relpos_bias/rel_embedding" in shapes
        num_heads, buckets = shapes[f"encoder/{'layers_0/' if per_layer else ''}relpos_bias/rel_embedding"]
        branches = [name for name in shapes if re.fullmatch(r"encoder/layers_0/mlp/wi(_\d)?/kernel", name)]
        return T5Config(
            vocab_size=vocab_size,
            emb_dim=emb_dim,
            num_heads=num_heads,
            num_encoder_layers=_layers("encoder", shapes),
            num_decoder_layers=_layers("decoder", shapes),
            mlp_dim=shapes[branches[0]][1],
            head_dim=shapes["encoder/layers_0/attention/query/kernel"][1] // num_heads,
            mlp_activations=("relu",) if len(branches) == 1 else ("gelu", "linear"),
            logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
            relative_attention_num_buckets=buckets,
            relative_bias_per_layer=per_layer,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


def _layers(stack: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 1 + max(int(found[1]) for name in shapes if (found := re.match(rf"{stack}/layers_(\d+)/", name)))


def from_scalable(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """Converts the parameters of T5X's scalable_t5 to our paths and shapes; other parameters are returned unchanged.

    scalable_t5 (network.py and layers.py) separates the heads of an attention: a kernel is [D, H, K], and the output's
    is [H, K, D]. With `scan_layers` all layers of a stack are one array, along axis 1: `encoder/encoder/mlp/wo/kernel`
    is [F, L, D].

    No array is read here. A chunk of such a file holds many layers: reading one of them reads the whole array, which
    stays in memory until its last layer or another array is read.

    Raises:
      ArrayError: the layers are along another axis.
    """
    width = arrays["token_embedder/embedding"].shape[1] if "token_embedder/embedding" in arrays else None
    latest: dict[Part, np.ndarray] = {}
    found: dict[str, StoredArray] = {}
    for name, array in arrays.items():
        match = STACKED.fullmatch(name)
        if match is None:
            found[name] = array
            continue
        stack, path = match.groups()
        if len(array.shape) < 2 or (path.endswith("/scale") and array.shape[0] != width):
            raise ArrayError(
                f"{name} is {list(array.shape)}, expected the layers along its axis 1 (T5X's param_scan_axis)"
            )
        for number in range(array.shape[1]):
            found[f"{stack}/layers_{number}/{path}"] = _layer(name, array, number, latest)
    return {name: _join_heads(name, array) for name, array in found.items()}


def _layer(name: str, stacked: StoredArray, number: int, latest: dict[Part, np.ndarray]) -> StoredArray:
    """Returns one layer of a stacked array; `latest` caches the parts of the stacked array that was read last."""

    def read(index: Index) -> np.ndarray:
        part = (name, *((span.start, span.stop) for span in index))
        if any(kept[0] != name for kept in latest):
            latest.clear()
        if part not in latest:
            latest[part] = stacked[(index[0], slice(None), *index[1:])]
        layers = latest.pop(part) if number == stacked.shape[1] - 1 else latest[part]
        return layers[:, number].copy()

    return StoredArray((stacked.shape[0], *stacked.shape[2:]), stacked.dtype, read)


def _join_heads(name: str, array: StoredArray) -> StoredArray:
    """Returns an attention's kernel [D, H, K] or [H, K, D] as a matrix, and any other array unchanged."""
    match = ATTENTION_KERNEL.fullmatch(name)
    if match is None or len(array.shape) != 3:
        return array
    if match[1] == "out":
        rows, columns = math.prod(array.shape[:2]), array.shape[2]
        return StoredArray(
            (rows, columns),
            array.dtype,
            lambda index: array[(slice(None), slice(None), index[1])].reshape(rows, -1)[index[0]],
        )
    rows, columns = array.shape[0], math.prod(array.shape[1:])
    return StoredArray(
        (rows, columns),
        array.dtype,
        lambda index: array[(index[0], slice(None), slice(None))].reshape(-1, columns)[:, index[1]],
    )


def to_scalable(arrays: Mapping[str, StoredArray], num_heads: int) -> dict[str, StoredArray]:
    """Returns the parameters with separate attention heads, as in scalable_t5 without `scan_layers`."""
    return {name: _split_heads(name, array, num_heads) for name, array in arrays.items()}


def _split_heads(name: str, array: StoredArray, num_heads: int) -> StoredArray:
    match = ATTENTION_KERNEL.fullmatch(name)
    if match is None:
        return array
    rows, columns = array.shape
    shape = (num_heads, rows // num_heads, columns) if match[1] == "out" else (rows, num_heads, columns // num_heads)
    return StoredArray(shape, array.dtype, lambda index: np.asarray(array).reshape(shape)[index])


def write(folder: str | os.PathLike, params: Arrays, vocabulary: str | os.PathLike | None = None) -> None:
    """Writes a checkpoint in T5X's own layout, with one array in memory at a time.

    The folder appears whole or not at all.

    Args:
      folder: the folder to write, which T5X expects to be named `checkpoint_<step>`.
      params: the parameters by path.
      vocabulary: the vocabulary to write beside them, as `write_vocabulary` takes it.
    """
    _write(t5x.write_legacy, folder, params, vocabulary)


def write_orbax(folder: str | os.PathLike, params: Arrays, vocabulary: str | os.PathLike | None = None) -> None:
    """Writes a checkpoint in the layout that T5X writes through Orbax. All arrays are in host memory at once.

    See `write` for the arguments.
    """
    _write(t5x.write_orbax, folder, params, vocabulary)


def _write(write_arrays: Callable[[Path, Arrays], None], folder, params: Arrays, vocabulary) -> None:
    with atomic_folder(folder) as partial:
        write_arrays(partial, params)
        if vocabulary:
            write_vocabulary(vocabulary, partial)

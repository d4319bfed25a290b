"""Opens and writes the arrays of safetensors files, as one file or in shards (Hugging Face's layout)."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prompt_tuning_jax.array_files.shards import open_shards
from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray, first_line
from prompt_tuning_jax.regular_files import regular

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def open_safetensors(folder: Path, stem: str = "model") -> dict[str, StoredArray]:
    """Opens the arrays of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` lists.

    Raises:
      ArrayError: there is no such file, it is truncated, or an array is not of floating-point numbers.
    """
    return open_shards(folder, f"{stem}.safetensors", _open_file)


def _open_file(path: Path) -> dict[str, StoredArray]:
    arrays = {}
    try:
        with safe_open(regular(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_slice(name)
                dtype = DTYPES.get(tensor.get_dtype())
                if dtype is None:
                    raise ArrayError(f"{name} of {path} is {tensor.get_dtype()}, expected {', '.join(DTYPES)}")
                arrays[name] = StoredArray(tuple(tensor.get_shape()), dtype, functools.partial(_read, path, name))
    except ArrayError:
        raise
    except Exception as error:  # safetensors and NumPy raise several types for a damaged header
        raise ArrayError(f"{path} cannot be read ({first_line(error)})") from None
    return arrays


def _read(path: Path, name: str, index: Index) -> np.ndarray:
    # Opened again for each array: if the file stayed mapped, the pages that were read would stay in memory.
    try:
        with safe_open(path, framework="numpy") as file:
            whole = all(part == slice(None) for part in index)
            return file.get_tensor(name) if whole else file.get_slice(name)[index]
    except Exception as error:
        raise ArrayError(f"{name} of {path} cannot be read ({first_line(error)})") from None


def write_safetensors(
    folder: Path, arrays: Mapping[str, np.ndarray | StoredArray], shard_bytes: int | None = None, stem: str = "model"
) -> None:
    """Writes `<stem>.safetensors`, or numbered shards with an index if one file would exceed `shard_bytes`."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, array in arrays.items():
        if shard_bytes and shards[-1] and used + array.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += array.nbytes
    files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(arrays[name]) for name in names}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, most likely
            raise OSError(f"{folder / file} cannot be written ({first_line(error)})") from None
        (folder / file).chmod(0o644)  # safetensors makes it readable only by its owner
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

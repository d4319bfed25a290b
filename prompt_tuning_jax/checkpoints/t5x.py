"""Base models in T5X's checkpoints: a msgpack index, small arrays inside it, large ones as zarr v2 arrays beside it."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from flax.serialization import msgpack_restore
from flax.traverse_util import flatten_dict

INDEX = "checkpoint"


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a T5X checkpoint."""
    return (folder / INDEX).is_file()


def read(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every parameter of `target` by its path, in the file's dtype; the optimiser's state is not read.

    Raises:
      ValueError: the index or an array is missing, truncated or unreadable.
    """
    path = Path(folder, INDEX)
    try:
        index = msgpack_restore(path.read_bytes())
        target = index["optimizer"]["target"]
        # A leaf is an array, or the specification of one that lies beside the index.
        leaves = flatten_dict(target, is_leaf=lambda _, node: isinstance(node, dict) and "driver" in node, sep="/")
    except Exception as error:  # msgpack raises many kinds on a broken file
        raise ValueError(
            f"{path} is not the index of a T5X checkpoint ({type(error).__name__}): set INITIAL_CHECKPOINT_PATH"
        ) from None
    return {
        name: _read_zarr(Path(folder), name, leaf) if isinstance(leaf, dict) else np.asarray(leaf)
        for name, leaf in leaves.items()
    }


def _read_zarr(folder: Path, name: str, spec: dict[str, Any]) -> np.ndarray:
    array_path = folder / "target.{}".format(name.replace("/", "."))
    try:
        store = tensorstore.open(
            {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{array_path}/"}}, open=True, read=True
        ).result()
        # tensorstore takes a chunk that is not there for zeros.
        grid = [
            math.ceil(size / chunk)
            for size, chunk in zip(store.shape, store.chunk_layout.read_chunk.shape, strict=True)
        ]
        lacking = [
            key for key in (".".join(map(str, at)) for at in np.ndindex(*grid)) if not (array_path / key).is_file()
        ]
        if lacking:
            raise ValueError(f"chunk {lacking[0]} is missing")
        if list(store.shape) != list(spec["metadata"]["shape"]):
            raise ValueError(f"it is {list(store.shape)}, the index says {list(spec['metadata']['shape'])}")
        return np.asarray(store.read().result())
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"{name} of the T5X checkpoint {folder} cannot be read ({reason}): "
            "set INITIAL_CHECKPOINT_PATH to a whole checkpoint"
        ) from None

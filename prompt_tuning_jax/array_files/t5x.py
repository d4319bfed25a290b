"""Opens and writes T5X checkpoints with tensorstore; they are on disk, or at a URL that tensorstore can open (`gs://`).

There are two layouts (T5X checkpoints.py):
  legacy  `checkpoint`, a msgpack index with the small arrays, and a zarr array beside it for each large one;
  Orbax   `state/`, which T5X writes by default since 2024: zarr arrays in an OCDBT database, or as folders.
Both name an array `target.<path>`, with dots for slashes, and the optimiser's state `state.param_states.<path>`.
"""

import contextlib
import functools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray, first_line
from prompt_tuning_jax.regular_files import is_irregular

CHUNK_BYTES, MOST_BYTES = 64 * 2**20, 2**34  # MOST_BYTES: four times mT5 XXL's embedding table
INDEX, STATE, METADATA, DATABASE = "checkpoint", "state/", "_METADATA", "manifest.ocdbt"
FLOATS = ("float32", "bfloat16", "float16", "float64")
# Gives up after half a minute without an answer; tensorstore's default of 32 attempts takes a quarter of an hour.
NETWORK = ts.Context({"gcs_request_retries": {"max_retries": 5, "initial_delay": "1s", "max_delay": "8s"}})


def is_t5x(location: str | os.PathLike) -> bool:
    """Returns whether there is a T5X checkpoint of either layout.

    Raises:
      ArrayError: `location` is a URL that cannot be read.
    """
    try:
        store = _open_folder(location)
        return any(_has(store, name) for name in (INDEX, *_orbax_marks("")))
    except ArrayError:
        if "://" in str(location):
            raise
        return False


def open_t5x(location: str | os.PathLike) -> dict[str, StoredArray]:
    """Opens all parameters, by paths such as `encoder/layers_0/mlp/wi_0/kernel`, without the optimiser's state.

    Args:
      location: the checkpoint's folder, such as `.../checkpoint_1100000`; a path or a URL.

    Raises:
      ArrayError: the index or an array is missing, truncated, unreadable, or not of floating-point numbers.
    """
    store = _open_folder(location)
    if "://" not in str(location):
        _check_regular(Path(location).rglob("*"))
    arrays = _open_layout(store, str(location))
    for name, array in arrays.items():
        if array.dtype.name not in FLOATS:
            raise ArrayError(f"{name} of {location} is {array.dtype}, expected {', '.join(FLOATS)}")
    return arrays


def _open_layout(store: ts.KvStore, where: str) -> dict[str, StoredArray]:
    if _has(store, INDEX):
        return _open_legacy(store, where)
    for folder in ("", STATE):
        if any(_has(store, folder + mark) for mark in (DATABASE, METADATA)):
            return _open_orbax(store, folder, where)
    raise ArrayError(f"{where} is no T5X checkpoint: it has neither {INDEX} nor {STATE}{METADATA}")


def _orbax_marks(folder: str) -> tuple[str, ...]:
    return tuple(f"{part}{mark}" for part in (folder, STATE) for mark in (DATABASE, METADATA))


def _open_folder(location: str | os.PathLike) -> ts.KvStore:
    url = str(location).rstrip("/") + "/"
    if "://" not in url:
        _check_regular(Path(location, name) for name in (INDEX, *_orbax_marks("")))
    try:
        if "://" in url:
            return ts.KvStore.open(url, context=NETWORK).result()
        return ts.KvStore.open({"driver": "file", "path": os.path.abspath(url) + "/"}).result()
    except Exception as error:  # tensorstore raises the errors of its drivers
        raise ArrayError(f"{location} cannot be opened ({first_line(error)})") from None


def _check_regular(paths: Iterable[Path]) -> None:
    """Raises ArrayError if a path is a named pipe or another irregular file."""
    for path in paths:
        if is_irregular(path):
            raise ArrayError(f"{path} is no regular file")


def _has(store: ts.KvStore, key: str) -> bool:
    return _get(store, key) is not None


def _get(store: ts.KvStore, key: str) -> bytes | None:
    try:
        found = store.read(key).result()
    except Exception as error:
        raise ArrayError(f"{key} of {store.url} cannot be read ({first_line(error)})") from None
    return found.value if found.state == "value" else None


def _open_legacy(store: ts.KvStore, where: str) -> dict[str, StoredArray]:
    try:
        target = msgpack_restore(_get(store, INDEX))["optimizer"]["target"]
        # A leaf is an array, or the tensorstore spec of an array beside the index.
        leaves: dict[str, Any] = flatten_dict(
            target, is_leaf=lambda _, node: isinstance(node, dict) and "driver" in node, sep="/"
        )
        inline = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
        shapes = {name: tuple(leaf["metadata"]["shape"]) for name, leaf in leaves.items() if name not in inline}
        # Only the last part of the path: an index may still have the folder where the checkpoint was first written.
        folder_of = {name: Path(leaves[name]["kvstore"]["path"]).name for name in shapes}
    except Exception as error:  # msgpack raises many types for a broken file
        raise ArrayError(f"{where}/{INDEX} is not the index of a T5X checkpoint ({type(error).__name__})") from None
    folders = {name: _folder(name) for name in shapes}
    for name, folder in folders.items():
        if folder_of[name] + "/" != folder:
            raise ArrayError(
                f"{name} of {where} cannot be read (the index says that it lies in {folder_of[name]!r:.200})"
            )
    arrays = _open_zarr(store, folders, where, "zarr")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ArrayError(
                f"{name} of {where} cannot be read (it is {list(arrays[name].shape)}, the index says {list(shape)})"
            )
    # Copied, because a view would keep the bytes of the whole index in memory.
    arrays |= {
        name: StoredArray(leaf.shape, leaf.dtype, lambda index, leaf=leaf: leaf[index].copy())
        for name, leaf in inline.items()
    }
    return {name: arrays[name] for name in leaves}


def _folder(name: str) -> str:
    return f"target.{name.replace('/', '.')}/"


def _open_orbax(store: ts.KvStore, folder: str, where: str) -> dict[str, StoredArray]:
    database = _has(store, folder + DATABASE)
    try:
        metadata = json.loads(_get(store, folder + METADATA) or b"{}")
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        paths = [
            [part["key"] for part in leaf["key_metadata"]]
            for leaf in metadata.get("tree_metadata", {}).values()
            if leaf["value_metadata"]["value_type"] != "None"
        ]
        names = ["/".join(path[1:]) for path in paths if path[0] == "target"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ArrayError(f"{where}/{folder}{METADATA} is not Orbax's ({first_line(error)})") from None
    if not names:
        raise ArrayError(f"{where}/{folder}{METADATA} names no parameters under `target`: not a checkpoint of T5X")
    try:
        spec = store.spec().to_json()
        spec["path"] = spec.get("path", "") + folder
        store = ts.KvStore.open({"driver": "ocdbt", "base": spec} if database else spec, context=NETWORK).result()
    except Exception as error:
        raise ArrayError(f"{where}/{folder}{DATABASE} cannot be read ({first_line(error)})") from None
    return _open_zarr(store, {name: _folder(name) for name in names}, where, driver)


def _open_zarr(store: ts.KvStore, folders: Mapping[str, str], where: str, driver: str) -> dict[str, StoredArray]:
    """Opens the arrays in `folders` of `store`, all at once, since over a network one after another takes minutes."""
    try:
        keys = [key.decode() for key in store.list().result()]
    except Exception as error:
        raise ArrayError(f"{where} cannot be listed ({first_line(error)})") from None
    chunks: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        folder, _, rest = key.partition("/")
        chunks[folder + "/"].add(rest)
    opening = {}
    for name, folder in folders.items():
        spec = store.spec().to_json()
        spec["path"] = spec.get("path", "") + folder
        opening[name] = ts.open({"driver": driver, "kvstore": spec}, open=True, read=True, context=NETWORK)
    arrays = {}
    for name, future in opening.items():
        try:
            array = future.result()
            _check_chunks(array, chunks[folders[name]])
            dtype = np.dtype(array.dtype.numpy_dtype)
        except Exception as error:  # tensorstore raises the errors of its drivers
            raise ArrayError(f"{name} of {where} cannot be read ({first_line(error)})") from None
        arrays[name] = StoredArray(tuple(array.shape), dtype, functools.partial(_read, array, name, where))
    return arrays


def _check_chunks(array: ts.TensorStore, stored: set[str]) -> None:
    """Raises ValueError if a chunk is missing, which tensorstore would read as zeros, or is not as T5X writes it."""
    layout, metadata = array.chunk_layout, array.spec().to_json()["metadata"]
    chunk = [part or 1 for part in layout.write_chunk.shape or ()]
    if any(part > size for part, size in zip(chunk, array.shape, strict=True)):
        raise ValueError(f"it is {list(array.shape)}, less than one of its chunks, {list(chunk)}")
    if math.prod(chunk) * array.dtype.numpy_dtype.itemsize > MOST_BYTES:  # allocated at once: too much ends the process
        raise ValueError(f"one of its chunks is said to be {list(chunk)}")
    if layout.inner_order != tuple(range(array.rank)) or str(metadata.get("dtype")).startswith(">"):
        raise ValueError("its bytes are in another order than T5X's")
    grid = [math.ceil(size / part) for size, part in zip(array.shape, chunk, strict=True)]
    expected = math.prod(grid)
    if expected <= len(stored):  # if not, chunks are missing; a damaged shape may have too many to list
        separator, prefix = metadata.get("dimension_separator", "."), ""
        if "chunk_key_encoding" in metadata:  # zarr 3
            encoding = metadata["chunk_key_encoding"]
            separator, prefix = ("/", "c/") if encoding["name"] == "default" else (".", "")
            separator = encoding.get("configuration", {}).get("separator", separator)
        stored = stored & {prefix + separator.join(map(str, index)) for index in np.ndindex(*grid)}
    if len(stored) < expected:
        raise ValueError(f"{expected - len(stored)} of its {expected} chunks are missing")


def _read(array: Any, name: str, where: str, index: Index) -> np.ndarray:
    try:
        return np.asarray(array[index].read().result())
    except Exception as error:
        raise ArrayError(f"{name} of {where} cannot be read ({first_line(error)})") from None


def write_legacy(folder: Path, arrays: Mapping[str, ArrayLike | StoredArray]) -> None:
    """Writes the legacy layout into an empty folder, with one array in memory at a time; the step is 0."""
    target = {}
    for path, value in arrays.items():
        array = np.asarray(value)
        name = f"target.{path.replace('/', '.')}/"
        # Chunks of equal size, because zarr pads the last one.
        pieces = min(array.shape[0], -(-array.nbytes // CHUNK_BYTES))
        chunks = [-(-array.shape[0] // pieces), *array.shape[1:]]
        metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": None}
        spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
        on_disk = {"driver": "file", "path": f"{folder.absolute() / name}/"}
        # Chunks of zeros are written, too, so that a reader can tell them from lost chunks.
        spec_on_disk = {**spec, "kvstore": on_disk, "store_data_equal_to_fill_value": True}
        with _as_os_error():
            ts.open(spec_on_disk, create=True).result().write(array).result()
        target[path] = {**spec, "kvstore": {"driver": "file", "path": name}}
    state = {"step": np.int32(0), "param_states": {}}
    index = {"version": 3, "optimizer": {"target": unflatten_dict(target, sep="/"), "state": state}}
    (folder / INDEX).write_bytes(msgpack_serialize(index))


def write_orbax(folder: Path, arrays: Mapping[str, ArrayLike | StoredArray]) -> None:
    """Writes the Orbax layout into an empty folder, with all arrays in memory; the step is 0."""
    import orbax.checkpoint as ocp  # imported here because it is slow, and nothing else needs it

    target = unflatten_dict({path: np.asarray(value) for path, value in arrays.items()}, sep="/")
    state = {"target": target, "state": {"step": np.int32(0), "param_states": {}}}
    written = folder.absolute() / "written"  # Orbax creates its folder itself
    with _as_os_error(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(written, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
    for part in written.iterdir():
        part.rename(folder / part.name)
    written.rmdir()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Turns any error into OSError: tensorstore and Orbax raise ValueError or others if the disk is full."""
    try:
        yield
    except Exception as error:
        raise OSError(first_line(error)) from None

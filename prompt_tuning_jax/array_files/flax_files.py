"""Opens the arrays in files of `flax.serialization.to_bytes`: `flax_model.msgpack`, as one file or in shards.

Such a file is a tree of msgpack maps (github.com/msgpack/msgpack/blob/master/spec.md). A leaf is an extension of type
1: the msgpack of (shape, name of the dtype, entries). An array of more than 2^30 bytes is a map instead, and its
`chunks` are flat arrays. The file is parsed once without reading the entries, which stay on disk.
"""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prompt_tuning_jax.array_files.shards import open_shards
from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray, first_line
from prompt_tuning_jax.array_files.strided import DTYPES, Run, strided_array
from prompt_tuning_jax.regular_files import regular

CHUNKED = "__msgpack_chunked_array__"
ARRAY = 1  # the msgpack extension type of an array
MOST_DEPTH, MOST_VALUES, MOST_DIMENSIONS, LONGEST_TEXT = 32, 500_000, 8, 1_000  # limits above those of any model


class Leaf(NamedTuple):
    """Describes an array of the file; `runs` says where its entries are."""

    shape: tuple[int, ...]
    dtype: str
    runs: list[Run]


def open_flax(folder: Path, name: str = "flax_model.msgpack") -> dict[str, StoredArray]:
    """Opens the arrays of a file of `to_bytes`, or of the shards that `<name>.index.json` lists.

    An array's name is its path in the tree, joined with slashes, such as "encoder/final_layer_norm/weight".

    Raises:
      ArrayError: there is no such file, it is truncated, or it is not a tree of floating-point arrays.
    """
    return open_shards(folder, name, _open_file)


def _open_file(path: Path) -> dict[str, StoredArray]:
    try:
        with regular(path).open("rb") as file:
            walker = _Walker(file, os.fstat(file.fileno()).st_size)
            tree = walker.value()
            if file.tell() != walker.end:
                raise ValueError("more bytes follow the tree")
        arrays: dict[str, StoredArray] = {}
        for name, leaf in _flat(tree).items():
            if leaf.dtype not in DTYPES:
                raise ArrayError(f"{name} of {path} is {leaf.dtype!r:.60}, expected {', '.join(DTYPES)}")
            arrays[name] = strided_array(path, name, DTYPES[leaf.dtype], leaf.shape, leaf.runs)
        return arrays
    except ArrayError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ArrayError(f"{path} cannot be read ({first_line(error)})") from None


def _flat(tree: Any) -> dict[str, Leaf]:
    if not isinstance(tree, dict):
        raise ValueError(f"it holds {_kind(tree)}, not a tree of arrays")
    leaves: dict[str, Leaf] = {}
    for key, node in tree.items():
        if isinstance(node, dict) and CHUNKED in node:
            node = _joined(node)
        if isinstance(node, Leaf):
            below = {key: node}
        elif isinstance(node, dict):
            below = {f"{key}/{rest}": leaf for rest, leaf in _flat(node).items()}
        else:
            raise ValueError(f"{key!r:.100} is {_kind(node)}, not an array")
        if twice := below.keys() & leaves.keys():
            raise ValueError(f"{min(twice)!r:.100} is there twice")
        leaves |= below
    return leaves


def _joined(node: dict[str, Any]) -> Leaf:
    """Returns the array that a map with `chunks` describes."""
    shape, chunks = (_values(node.get(name)) for name in ("shape", "chunks"))
    leaves = [chunk for chunk in chunks if isinstance(chunk, Leaf)]
    if not chunks or len(leaves) < len(chunks) or len({leaf.dtype for leaf in leaves}) > 1:
        raise ValueError("the chunks of an array are not arrays of one dtype")
    entries = sum(math.prod(leaf.shape) for leaf in leaves)
    if any(len(leaf.shape) != 1 for leaf in leaves) or math.prod(_shape(shape)) != entries:
        raise ValueError(f"an array in chunks is {list(shape)}, and its chunks have {entries:,} entries")
    return Leaf(_shape(shape), leaves[0].dtype, [run for leaf in leaves for run in leaf.runs])


def _values(node: Any) -> list[Any]:
    """Returns the values of a map with the keys "0", "1" and so on, which is how Flax writes a tuple."""
    if not isinstance(node, dict) or {*node} != {str(i) for i in range(len(node))}:
        raise ValueError("an array in chunks lacks its shape or one of its chunks")
    return [node[str(i)] for i in range(len(node))]


def _shape(found: Any) -> tuple[int, ...]:
    sizes = isinstance(found, list) and all(type(size) is int and 0 <= size < 2**63 for size in found)
    if not sizes or len(found) > MOST_DIMENSIONS:
        raise ValueError("an array has an invalid shape")
    return tuple(found)


def _kind(value: Any) -> str:
    return "an array" if isinstance(value, Leaf) else f"a value of type {type(value).__name__}"


class _Walker:
    """Reads the values of a msgpack file one after another, but of a byte string only its position and length."""

    def __init__(self, file: BinaryIO, end: int):
        self.file, self.end, self.values = file, end, 0

    def value(self, depth: int = 0) -> Any:
        """Returns the next value: a dict, a list, a `Leaf`, a `Run` of bytes, text, an int, a bool or None."""
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        self.values += 1
        if self.values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        (tag,) = self._bytes(1)
        if tag < 0x80:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag < 0x90:
            return self._map(tag & 0x0F, depth)
        if tag < 0xA0:
            return self._list(tag & 0x0F, depth)
        if tag < 0xC0:
            return self._text(tag & 0x1F)
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if tag in (0xC4, 0xC5, 0xC6):
            return self._skip(self._number(1 << tag - 0xC4))
        if tag in (0xC7, 0xC8, 0xC9):
            return self._extension(self._number(1 << tag - 0xC7), depth)
        if tag in (0xCC, 0xCD, 0xCE, 0xCF):
            return self._number(1 << tag - 0xCC)
        if tag in (0xD0, 0xD1, 0xD2, 0xD3):
            return self._number(1 << tag - 0xD0, signed=True)
        if tag in (0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
            return self._extension(1 << tag - 0xD4, depth)
        if tag in (0xD9, 0xDA, 0xDB):
            return self._text(self._number(1 << tag - 0xD9))
        if tag in (0xDC, 0xDD):
            return self._list(self._number(2 << tag - 0xDC), depth)
        if tag in (0xDE, 0xDF):
            return self._map(self._number(2 << tag - 0xDE), depth)
        raise ValueError(f"it has the byte {tag:#x} where a value is expected")

    def _bytes(self, count: int) -> bytes:
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError("it is truncated")
        return found

    def _number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self._bytes(count), "big", signed=signed)

    def _text(self, count: int) -> str:
        if count > LONGEST_TEXT:
            raise ValueError(f"it has a name of {count:,} bytes")
        return self._bytes(count).decode()

    def _skip(self, count: int) -> Run:
        start = self.file.tell()
        if start + count > self.end:
            raise ValueError("it is truncated")
        self.file.seek(count, os.SEEK_CUR)
        return Run(start, count)

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key of a map is no text")
            if key in found:
                raise ValueError(f"a map has the key {key!r:.100} twice")
            found[key] = self.value(depth + 1)
        return found

    def _list(self, count: int, depth: int) -> list[Any]:
        if count > MOST_DIMENSIONS:  # only an array's shape and its three parts are lists
            raise ValueError(f"it has a list of {count:,} values")
        return [self.value(depth + 1) for _ in range(count)]

    def _extension(self, count: int, depth: int) -> Leaf:
        kind, start = self._number(1, signed=True), self.file.tell()
        if kind != ARRAY:
            raise ValueError(f"it has an extension of type {kind}, expected {ARRAY}")
        if start + count > self.end:
            raise ValueError("it is truncated")
        parts = self.value(depth + 1)
        if not isinstance(parts, list) or len(parts) != 3 or self.file.tell() != start + count:
            raise ValueError("an array is not as Flax writes it")
        sizes, dtype, run = parts
        shape, known = _shape(sizes), DTYPES.get(dtype) if isinstance(dtype, str) else None
        if not isinstance(dtype, str) or not isinstance(run, Run):
            raise ValueError("an array is not as Flax writes it")
        if known is not None:
            if math.prod(shape) * known.itemsize != run.count:
                raise ValueError(f"an array is {list(shape)} of {dtype}, and has {run.count:,} bytes")
            run = Run(run.start, math.prod(shape))
        return Leaf(shape, dtype, [run])

"""Reads arrays whose entries are uncompressed in a file, or parts of them, without reading the rest of the file."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from prompt_tuning_jax.array_files.stored import ArrayError, Index, StoredArray, first_line

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
BLOCK_BYTES = 2**24  # read at a time if the entries of an array are not adjacent
GAP_BYTES = 2**14  # a larger gap between the entries of two rows is skipped, a smaller one is read


class Run(NamedTuple):
    """Describes adjacent entries of a file.

    Attributes:
      start: the byte offset of the first entry.
      count: the number of entries.
    """

    start: int
    count: int


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides, in entries, of an array whose rows are adjacent.

    >>> c_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def strided_array(
    path: Path,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    runs: Sequence[Run],
    strides: tuple[int, ...] | None = None,
    first: int = 0,
) -> StoredArray:
    """Returns an array of a file. Reading a part of it reads no more of the file than the part spans.

    Args:
      name: the array's name, for errors.
      dtype: the dtype in the file, little-endian.
      runs: where the entries are, one run after the other.
      strides: strides in entries, none negative; None if the rows are adjacent.
      first: the index, within the runs, of the array's first entry.

    Raises:
      ArrayError: the shape has no entries.
    """
    if 0 in shape:
        raise ArrayError(f"{name} of {path} is {list(shape)}, which is empty")
    steps = c_strides(shape) if strides is None else strides
    # A file may have any stride for a dimension of size 1.
    steps = tuple(0 if size == 1 else step for size, step in zip(shape, steps, strict=True))
    return StoredArray(shape, dtype, functools.partial(_read_part, path, name, dtype, shape, runs, steps, first))


def _read_part(
    path: Path,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    runs: Sequence[Run],
    strides: tuple[int, ...],
    first: int,
    index: Index,
) -> np.ndarray:
    spans = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    begin = first + sum(span[0] * stride for span, stride in zip(spans, strides, strict=True))
    part = np.empty([max(0, stop - start) for start, stop, _ in spans], dtype)
    try:
        with path.open("rb") as file:
            _fill(part, file, runs, begin, strides)
    except (OSError, EOFError) as error:
        raise ArrayError(f"{name} of {path} cannot be read ({first_line(error)})") from None
    return part


def _fill(part: np.ndarray, file: BinaryIO, runs: Sequence[Run], begin: int, strides: Sequence[int]) -> None:
    """Fills `part` with the entries of an array with these strides; its first entry has index `begin` in the runs."""
    slowest_first = sorted(range(part.ndim), key=lambda axis: -strides[axis])
    view, steps = part.transpose(slowest_first), [strides[axis] for axis in slowest_first]
    adjacent = all(
        size == 1 or step == expected
        for size, step, expected in zip(view.shape, steps, c_strides(view.shape), strict=True)
    )
    if adjacent and view.flags.c_contiguous:
        return _read(view.reshape(-1), file, runs, begin)
    inner = 1 + sum((size - 1) * step for size, step in zip(view.shape[1:], steps[1:], strict=True))
    gap, row_bytes = (steps[0] - inner) * part.itemsize, max(1, steps[0]) * part.itemsize
    rows = 1 if gap > GAP_BYTES else max(1, BLOCK_BYTES // row_bytes)
    for row in range(0, len(view), rows):
        block = view[row : row + rows]
        flat = np.empty((len(block) - 1) * steps[0] + inner, part.dtype)
        _read(flat, file, runs, begin + row * steps[0])
        block[...] = np.lib.stride_tricks.as_strided(flat, block.shape, [step * part.itemsize for step in steps])


def _read(flat: np.ndarray, file: BinaryIO, runs: Sequence[Run], begin: int) -> None:
    """Fills `flat` with adjacent entries, from index `begin` of the runs."""
    done = 0
    for start, count in runs:
        if begin < count and done < len(flat):
            some = min(count - begin, len(flat) - done)
            file.seek(start + begin * flat.itemsize)
            _read_bytes(flat[done : done + some].view(np.uint8), file)
            done += some
        begin = max(0, begin - count)
    if done < len(flat):
        raise EOFError("it is truncated")


def _read_bytes(target: np.ndarray, file: BinaryIO) -> None:
    done = 0
    while done < len(target):  # one call may read less than it is asked for
        some = file.readinto(memoryview(target)[done:])  # type: ignore[attr-defined]
        if not some:
            raise EOFError("it is truncated")
        done += some

"""Defines `StoredArray`, an array on disk whose shape and dtype are known before it is read."""

import math
from collections.abc import Callable

import numpy as np


class ArrayError(ValueError):
    """Says, in one line, which array or file of arrays is missing, truncated or unreadable."""


Index = tuple[slice, ...]  # one slice per dimension, with step 1


class StoredArray:
    """An array on disk: `np.asarray` reads it, and `array[index]` reads a part. Each call reads again; nothing is kept.

    Attributes:
      shape: the shape of the array that is returned; a transposed array has another shape in the file.
      dtype: the dtype of the entries in the file.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]):
        """Takes the shape, the dtype, and `read`, which returns the part of the array at an index."""
        self.shape, self.dtype, self._read = shape, dtype, read
        self._transposed: StoredArray | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> "StoredArray":
        """The transposed array, which is not read yet."""
        if self._transposed is not None:
            return self._transposed
        read = lambda index: np.ascontiguousarray(self._read(index[::-1]).T)  # noqa: E731
        transposed = StoredArray(self.shape[::-1], self.dtype, read)
        transposed._transposed = self  # transposing twice returns the array itself
        return transposed

    def __getitem__(self, index: Index) -> np.ndarray:
        """Returns the part at `index`, which has a slice for each dimension.

        It reads only the bytes of this part, as far as the file's layout allows.
        """
        return self._read(index)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._read((slice(None),) * len(self.shape)))
        return array if dtype is None else array.astype(dtype, copy=False)


def first_line(error: Exception) -> str:
    """Returns the first line of an exception's message, or its type; at most 200 characters, for our own messages."""
    return ((str(error).strip() or type(error).__name__).splitlines()[0])[:200]

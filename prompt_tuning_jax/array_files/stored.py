"""An array that lies on disk, known by shape and dtype before it is read."""

import math
from collections.abc import Callable

import numpy as np


class ArrayError(ValueError):
    """An array, or the file of arrays, is missing, truncated or unreadable. The message says which; one line."""


Index = tuple[slice, ...]  # one a dimension, of step 1


class StoredArray:
    """An array on disk. `np.asarray` reads it, `array[index]` a part of it, anew each time, and nothing is kept.

    Attributes:
      shape: of the array as it is given.
      dtype: of the file.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]):
        """`read` reads the part at an index."""
        self.shape, self.dtype, self._read = shape, dtype, read
        self._transposed: StoredArray | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def T(self) -> "StoredArray":
        """The transposed array; nothing is read."""
        if self._transposed is not None:
            return self._transposed
        read = lambda index: np.ascontiguousarray(self._read(index[::-1]).T)  # noqa: E731
        transposed = StoredArray(self.shape[::-1], self.dtype, read)
        transposed._transposed = self  # transposed twice, an array is read as it lies
        return transposed

    def __getitem__(self, index: Index) -> np.ndarray:
        """The part at `index`, which has a slice for each dimension; only its bytes are read, as far as the file's
        layout lets them be."""
        return self._read(index)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = np.asarray(self._read((slice(None),) * len(self.shape)))
        return array if dtype is None else array.astype(dtype, copy=False)


def first_line(error: Exception) -> str:
    """What a library's exception says, short enough for a message of ours."""
    return ((str(error).strip() or type(error).__name__).splitlines()[0])[:200]

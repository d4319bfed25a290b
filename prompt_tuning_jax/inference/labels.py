"""Converts a fixed set of labels to token ids, and to the text that their ids decode to."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary


def written_labels(labels: Sequence[str], vocabulary: Vocabulary) -> dict[str, str]:
    """Returns each label by the text that its tokens decode to: a lower-casing vocabulary writes "True" as "true".

    Raises:
      ValueError: two labels decode to the same text.
    """
    written: dict[str, str] = {}
    for label in labels:
        text = vocabulary.written(label)
        if text in written:
            raise SettingError(
                f"the labels {written[text]!r} and {label!r} are both {text!r} in the vocabulary {vocabulary.path}: "
                "set ",
                Setting("initial_checkpoint_path"),
                " or ",
                Setting("vocabulary"),
                " to one that tells them apart",
            )
        written[text] = label
    return written


def label_table(labels: Sequence[str], vocabulary: Vocabulary) -> Int[np.ndarray, "C L"]:
    """Returns the token ids of each label, with end of sequence and padding, for `log_likelihood.choice_scores`."""
    rows = [[*vocabulary.encode(label), vocabulary.eos_id] for label in labels]
    table = np.full((len(rows), max(map(len, rows))), vocabulary.pad_id, np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table


class LabelTables:
    """Caches the token ids of label sets up to a number of bytes; the least recently used set is dropped first."""

    def __init__(self, read: Callable[[tuple[str, ...]], Int[np.ndarray, "C L"]], max_bytes: int):
        """Starts with an empty cache.

        Args:
          read: returns the table of a label set. Its errors are raised to the caller and not cached.
          max_bytes: the largest size of all labels and tables together.
        """
        self.size, self._read, self._max_bytes = 0, read, max_bytes
        self._tables: OrderedDict[tuple[str, ...], Int[np.ndarray, "C L"]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, labels: tuple[str, ...]) -> Int[np.ndarray, "C L"]:
        """Returns the table of these labels."""
        with self._lock:
            if labels in self._tables:
                self._tables.move_to_end(labels)
                return self._tables[labels]
        table = self._read(labels)
        with self._lock:
            if labels not in self._tables:
                self._tables[labels] = table
                self.size += _bytes(labels, table)
            while self.size > self._max_bytes:
                self.size -= _bytes(*self._tables.popitem(last=False))
        return table


def _bytes(labels: tuple[str, ...], table: np.ndarray) -> int:
    return sum(map(sys.getsizeof, labels)) + sys.getsizeof(labels) + table.nbytes

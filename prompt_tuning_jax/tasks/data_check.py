"""Checks the tokens of a split for rows that a model cannot read, answer or learn, and counts them."""

import collections
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks.postprocessors import UNLABELLED
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary, trim

SAMPLE = 100_000  # how many rows of a split are checked for tokens and targets
MOST_INPUTS = 500_000  # how many rows of a split have their inputs compared with those of another split
BLOCK = 1_000  # a sample has blocks of this many consecutive rows
FEATURES = ("inputs", "targets")


class Tokens(NamedTuple):
    """Holds the concatenated token ids of consecutive rows, and the length of each row."""

    flat: Int[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " n"]


class DataCheck:
    """Counts unknown tokens, and targets that decode to another text than they were encoded from.

    >>> check = DataCheck(Vocabulary("bytes"))
    >>> check.add(Tokens(np.array([5, 2, 1]), np.array([3])), Tokens(np.array([100, 1]), np.array([2])), ["a"])
    >>> [*check.lines()]
    ['unknown tokens are 50% of inputs (in 1 of 1 rows)']
    """

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary
        self._unk = -1 if vocabulary.unk_id is None else vocabulary.unk_id
        self.rows = 0
        self._tokens: collections.Counter[str] = collections.Counter()
        self._unknown: collections.Counter[str] = collections.Counter()
        self._rows_with_unknown: collections.Counter[str] = collections.Counter()
        self._texts: collections.Counter[str] = collections.Counter()
        self._written: dict[str, str] = {}  # each target's text after encoding and decoding

    def add(self, inputs: Tokens, targets: Tokens, texts: Sequence[str | None]) -> None:
        """Adds consecutive rows to the counts.

        Args:
          inputs, targets: token ids, including the end of sequence, not truncated.
          texts: the targets' texts before they were tokenised; None for a text that is not known.
        """
        self.rows += len(texts)
        labelled = np.array([text != UNLABELLED for text in texts], np.bool_)  # T5 writes <unk> if there is no label
        for name, part, counts in (("inputs", inputs, np.ones_like(labelled)), ("targets", targets, labelled)):
            ends = np.cumsum(part.lengths)
            rows = np.searchsorted(ends, np.flatnonzero(part.flat == self._unk), side="right")
            rows = rows[counts[rows]]
            self._tokens[name] += int(np.maximum(part.lengths - 1, 0)[counts].sum())
            self._unknown[name] += len(rows)
            self._rows_with_unknown[name] += len(np.unique(rows))
        starts = np.cumsum(targets.lengths) - targets.lengths
        for text, start, length in zip(texts, starts.tolist(), targets.lengths.tolist(), strict=True):
            if text is None or text == UNLABELLED:
                continue
            self._texts[text] += 1
            if text not in self._written:
                decoded = self._vocabulary.decode(targets.flat[start : start + length])
                # If they differ, encode the text again: the tokens may have more than the text, such as a sentinel.
                self._written[text] = text if decoded == text else self._vocabulary.written(text)

    def lines(self) -> Iterator[str]:
        """Yields a line per kind of problem that was found."""
        found = [
            f"{_share(self._unknown[name], self._tokens[name])} of {name} (in {self._rows_with_unknown[name]:,} of "
            f"{self.rows:,} rows)"
            for name in FEATURES
            if self._unknown[name]
        ]
        if found:
            yield f"unknown tokens are {' and '.join(found)}"
        changed = [(text, count) for text, count in self._texts.most_common() if self._written[text] != text]
        if changed:
            rows = sum(count for _, count in changed)
            shown = [f"{_truncate(text)} becomes {_truncate(self._written[text])}" for text, _ in changed[:3]]
            more = f" and {len(changed) - 3:,} more" if len(changed) > 3 else ""
            yield f"targets of {rows:,} of {self.rows:,} rows do not decode to themselves: {', '.join(shown)}{more}"


def blocks(count: int, most: int = SAMPLE) -> list[slice]:
    """Returns slices of the rows to check: all of `count` rows, or at most `most` in evenly spaced blocks."""
    if count <= most:
        return [slice(0, count)]
    starts = np.linspace(0, count - BLOCK, most // BLOCK).astype(int).tolist()
    return [slice(start, start + BLOCK) for start in starts]


def row_hashes(tokens: Tokens) -> list[int]:
    """Returns a hash of each row's ids. Hashes are comparable only within this process."""
    data = np.ascontiguousarray(tokens.flat, "<i4").tobytes()
    ends = (4 * np.cumsum(tokens.lengths)).tolist()
    return [hash(data[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def check_trimmed_labels(labels: Iterable[str], vocabulary: Vocabulary, lengths: Mapping[str, int]) -> list[str]:
    """Returns the labels that are longer than `lengths`, so that generation can never give them.

    Raises:
      SettingError: two labels have the same tokens after truncation; the message names both.
    """
    limit = lengths["targets"]
    ids = {label: np.array([*vocabulary.encode(label), vocabulary.eos_id]) for label in labels}
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in ids.items():
        other = seen.setdefault(tuple(trim(tokens, limit).tolist()), label)
        # Labels that have the same tokens even without truncation are no fault of the lengths.
        if not np.array_equal(ids[other], tokens):
            longest = max(map(len, ids.values()))
            raise SettingError(
                f"the labels {other!r} and {label!r} are the same in the first {limit} tokens of targets, end of "
                "sequence included: set ",
                Setting("task_feature_lengths"),
                f" to at least {longest} for 'targets', which holds every label",
            )
    return [label for label, tokens in ids.items() if len(tokens) > limit]


def truncated_labels_warning(labels: Sequence[str]) -> str:
    """Returns the warning about labels that `check_trimmed_labels` returned."""
    return f"no answer is generated as {', '.join(map(repr, labels))}: the length of targets truncates it"


def shared_inputs_warning(count: int, rows: int, *, at_least: bool = False) -> str:
    """Returns the warning that `count` of `rows` evaluation rows have the same inputs as a training row."""
    return f"inputs of {'at least ' * at_least}{count:,} of {rows:,} rows are those of a training row"


def check_something_left(longest: Mapping[str, int], shortest: Mapping[str, int], lengths: Mapping[str, int]) -> None:
    """Raises SettingError if truncation leaves only the end of sequence of every row's inputs or targets.

    Args:
      longest, shortest: the numbers of tokens of the longest and the shortest row, including the end of sequence.
      lengths: the lengths to which rows are truncated.
    """
    for name in FEATURES:
        if lengths[name] == 1 < shortest[name]:
            raise SettingError(
                Setting("task_feature_lengths"), f" has 1 token for {name!r}, which is the end of sequence alone: "
                f"expected up to {longest[name]}, the longest of these rows",
            )  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2g}%"


def _truncate(text: str) -> str:
    shorten = reprlib.Repr()
    shorten.maxstring = 60
    return shorten.repr(text)

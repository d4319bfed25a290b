"""What of a split's rows a model cannot read, answer or learn as they stand, counted from their tokens."""

import collections
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks.postprocessors import UNLABELLED
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary, trim

SAMPLE = 100_000  # rows of a split whose tokens and targets are looked at
MOST_INPUTS = 500_000  # rows of a split whose inputs are compared with another's
BLOCK = 1_000  # neighbouring rows, of which a sample is made
FEATURES = ("inputs", "targets")


class Tokens(NamedTuple):
    """The token ids of neighbouring rows, one row after another, and each row's length."""

    flat: Int[np.ndarray, " tokens"]
    lengths: Int[np.ndarray, " n"]


class DataCheck:
    """Counts unknown tokens, and targets that the tokenizer does not give back.

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
        self._written: dict[str, str] = {}  # what the tokenizer makes of each text

    def add(self, inputs: Tokens, targets: Tokens, texts: Sequence[str | None]) -> None:
        """Counts neighbouring rows.

        Args:
          inputs, targets: token ids, end of sequence included, before any truncation.
          texts: the targets before they were tokenised; None if it is not known.
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
                # The tokens may be those of more than the text.
                self._written[text] = text if decoded == text else self._vocabulary.written(text)

    def lines(self) -> Iterator[str]:
        """Yields what was found, in a line for each kind."""
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
            shown = [f"{_cut(text)} becomes {_cut(self._written[text])}" for text, _ in changed[:3]]
            more = f" and {len(changed) - 3:,} more" if len(changed) > 3 else ""
            yield f"targets of {rows:,} of {self.rows:,} rows do not decode to themselves: {', '.join(shown)}{more}"


def blocks(count: int, most: int = SAMPLE) -> list[slice]:
    """Returns which of `count` rows are looked at: all up to `most`, or blocks of neighbours at equal distances."""
    if count <= most:
        return [slice(0, count)]
    starts = np.linspace(0, count - BLOCK, most // BLOCK).astype(int).tolist()
    return [slice(start, start + BLOCK) for start in starts]


def row_hashes(tokens: Tokens) -> list[int]:
    """Returns a hash of each row's ids, the same for the same ids within a process."""
    data = np.ascontiguousarray(tokens.flat, "<i4").tobytes()
    ends = (4 * np.cumsum(tokens.lengths)).tolist()
    return [hash(data[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def check_trimmed_labels(labels: Iterable[str], vocabulary: Vocabulary, lengths: Mapping[str, int]) -> list[str]:
    """Returns the labels that `lengths` truncate: no answer is generated as one of these.

    Raises:
      SettingError: two labels have the same tokens once they are truncated; the message names both.
    """
    limit = lengths["targets"]
    ids = {label: np.array([*vocabulary.encode(label), vocabulary.eos_id]) for label in labels}
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in ids.items():
        other = seen.setdefault(tuple(trim(tokens, limit).tolist()), label)
        # Labels of the same tokens before that are the tokenizer's matter.
        if not np.array_equal(ids[other], tokens):
            longest = max(map(len, ids.values()))
            raise SettingError(
                f"the labels {other!r} and {label!r} are the same in the first {limit} tokens of targets, end of "
                "sequence included: set ",
                Setting("task_feature_lengths"),
                f" to at least {longest} for 'targets', which holds every label",
            )
    return [label for label, tokens in ids.items() if len(tokens) > limit]


def truncated_labels(labels: Sequence[str]) -> str:
    """Returns what to say of labels that `check_trimmed_labels` returned."""
    return f"no answer is generated as {', '.join(map(repr, labels))}: the length of targets truncates it"


def shared(both: int, rows: int, *, at_least: bool = False) -> str:
    """Returns what to say of rows to evaluate on that have the inputs of a training row."""
    return f"inputs of {'at least ' * at_least}{both:,} of {rows:,} rows are those of a training row"


def check_something_left(longest: Mapping[str, int], shortest: Mapping[str, int], lengths: Mapping[str, int]) -> None:
    """Raises SettingError if truncation leaves nothing but the end of sequence of every row's inputs or targets.

    Args:
      longest, shortest: tokens of the longest and the shortest row, end of sequence included.
    """
    for name in FEATURES:
        if lengths[name] == 1 < shortest[name]:
            raise SettingError(
                Setting("task_feature_lengths"), f" has 1 token for {name!r}, which is the end of sequence alone: "
                f"expected up to {longest[name]}, the longest of these rows",
            )  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2g}%"


def _cut(text: str) -> str:
    shorten = reprlib.Repr()
    shorten.maxstring = 60
    return shorten.repr(text)

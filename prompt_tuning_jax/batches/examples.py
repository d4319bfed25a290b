"""Holds the tokenised rows of a split, with their postprocessor and metrics, using only NumPy.

Batches and evaluations read an `Examples`. Its tokens are in memory, if `tokenize_rows` made them from rows of text, or
in the files of the cache (`cache.CachedExamples`).
"""

import abc
import functools
import hashlib
import importlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from prompt_tuning_jax.tasks.data_check import Tokens
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

CHUNK = 4096  # texts per call of the tokenizer
PATIENCE = 2.0  # seconds before a progress bar is shown


class Ragged:
    """Rows of different lengths that are concatenated in one array."""

    def __init__(self, flat: Int[np.ndarray, " tokens"], ends: Int[np.ndarray, " n"]):
        self._flat = flat
        self._starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.lengths: Int[np.ndarray, " n"] = ends - self._starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int | np.integer) -> Int[np.ndarray, " length"]:
        start = self._starts[row]
        return self._flat[start : start + self.lengths[row]]

    def part(self, rows: Int[np.ndarray, " n"]) -> Tokens:
        """Returns the tokens and the lengths of `rows`, which must be consecutive."""
        lengths = self.lengths[rows]
        start = self._starts[rows[0]] if len(rows) else 0
        return Tokens(self._flat[start : start + lengths.sum()], lengths)

    def update(self, digest: Any, rows: Int[np.ndarray, " n"]) -> None:
        """Adds the lengths and the tokens of `rows`, which must be consecutive, to a hash."""
        flat, lengths = self.part(rows)
        digest.update(lengths.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(flat, "<i4").data)


class Examples(abc.ABC):
    """Holds a split or a slice of one: its tokens by index, its postprocessor and its metrics.

    Attributes:
      inputs, targets: token ids of the whole split, including the end of sequence, not truncated.
      rows: the indices of this slice's rows in `inputs` and `targets`; they are consecutive.
    """

    def __init__(self, inputs: Ragged, targets: Ragged, scoring: Mapping[str, Any], rows: slice = slice(None)):
        """Takes a whole split and a slice of it.

        Args:
          inputs, targets: the tokens of the whole split.
          scoring: the "postprocessor" and the "metrics", as `describe` returns them.
          rows: the slice, without a step.
        """
        self.inputs, self.targets = inputs, targets
        self._scoring = {name: scoring[name] for name in ("postprocessor", "metrics")}
        self._slice = rows
        self.rows: Int[np.ndarray, " n"] = np.arange(len(inputs))[rows]

    def __len__(self) -> int:
        return len(self.rows)

    @abc.abstractmethod
    def __getitem__(self, rows: slice) -> "Examples":
        """Returns a slice of the whole split."""

    @property
    @abc.abstractmethod
    def fields(self) -> list[dict[str, Any]]:
        """Returns the fields of each example other than its tokens, including "targets_pretokenized"."""

    @abc.abstractmethod
    def target_texts(self, rows: Int[np.ndarray, " n"]) -> list[str | None]:
        """Returns the text of the targets of some rows; None for a row whose text was not kept.

        Args:
          rows: ascending indices in the whole split.
        """

    @abc.abstractmethod
    def _fields_digest(self) -> str:
        """Returns a hash of the fields that scoring may read."""

    @functools.cached_property
    def postprocess(self) -> Callable[..., Any]:
        """Returns the task's postprocessor, `(text, example=...) -> value that the metrics compare`."""
        spec = self._scoring["postprocessor"]
        return rebuild(spec) if spec else lambda text, **_: text

    @functools.cached_property
    def metrics(self) -> list[Callable[[Sequence, Sequence], dict[str, float]]]:
        """Returns the task's metrics, each `(targets, predictions) -> {name: per cent}`; [] for a pre-training task."""
        return [rebuild(spec) for spec in self._scoring["metrics"]]

    def count_truncated(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """Returns the number of rows whose inputs, and whose targets, are longer than `lengths`."""
        return {
            name: int((part.lengths[self.rows] > lengths[name]).sum())
            for name, part in (("inputs", self.inputs), ("targets", self.targets))
        }

    def longest_and_shortest(self) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the numbers of tokens of the longest inputs and targets, and of the shortest."""
        lengths = {"inputs": self.inputs.lengths[self.rows], "targets": self.targets.lengths[self.rows]}
        most, least = ({name: int(function(found)) for name, found in lengths.items()} for function in (np.max, np.min))
        return most, least

    def token_fingerprint(self) -> str:
        """Returns a hash of the rows' tokens in order, independent of their source, as 16 hexadecimal digits."""
        digest = hashlib.sha256(np.int64(len(self)).tobytes())
        for part in (self.inputs, self.targets):
            part.update(digest, self.rows)
        return digest.hexdigest()[:16]

    def fingerprint(self) -> str:
        """Returns a hash of everything that training and evaluation read, as 16 hexadecimal digits.

        It covers the tokens, the order of the rows, the fields that scoring reads, and the postprocessor and the
        metrics with their options. It does not cover names and paths.
        """
        return hash_of(self.token_fingerprint(), self._fields_digest(), self._scoring)


class MemoryExamples(Examples):
    """A split that was tokenised in this process from rows of text."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        inputs: Ragged,
        targets: Ragged,
        scoring: Mapping[str, Any],
        part: slice = slice(None),
    ):
        super().__init__(inputs, targets, scoring, part)
        self._texts = rows

    def __getitem__(self, rows: slice) -> "MemoryExamples":
        return MemoryExamples(self._texts, self.inputs, self.targets, self._scoring, rows)

    @functools.cached_property
    def fields(self) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in row.items() if name not in ("inputs", "targets")}
            | {f"{name}_pretokenized": row[name] for name in ("inputs", "targets")}
            for row in self._texts[self._slice]
        ]

    def target_texts(self, rows: Int[np.ndarray, " n"]) -> list[str | None]:
        return [self._texts[row]["targets"] for row in rows.tolist()]

    def _fields_digest(self) -> str:
        return texts_digest(self._texts[self._slice])


_tokenized: weakref.WeakValueDictionary[str, MemoryExamples] = weakref.WeakValueDictionary()


def tokenize_rows(
    rows: Sequence[Mapping[str, Any]],
    vocabulary: Vocabulary,
    postprocess: Callable[..., Any] | None = None,
    metrics: Sequence[Callable[..., Any]] = (),
    *,
    quiet: bool = True,
) -> Examples:
    """Tokenises rows of text as SeqIO's `tokenize` does: the ids of each text, then an end of sequence.

    Rows whose tokens are already in memory are not tokenised again, so the runs of a sweep share them.

    Args:
      rows: mappings with "inputs" and "targets"; other fields of a row are kept in `fields`.
      vocabulary: the tokenizer.
      postprocess: a function at the top level of a module, or a `functools.partial` of one with keyword arguments; None
        to keep the text unchanged.
      metrics: functions of the same kind.
      quiet: whether to show no progress bar.
    """
    scoring = {
        "postprocessor": describe(postprocess) if postprocess else None,
        "metrics": [describe(metric) for metric in metrics],
    }
    only_texts = all(len(row) == 2 for row in rows)
    key = hash_of(vocabulary.fingerprint, texts_digest(rows), scoring)
    if only_texts and (found := _tokenized.get(key)) is not None:
        return found
    with tqdm(total=len(rows), desc="tokenising", unit="row", delay=PATIENCE, leave=False, disable=quiet) as bar:
        chunks: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}
        ends: dict[str, list[int]] = {"inputs": [], "targets": []}
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for name in chunks:
                ids = vocabulary.encode_all([row[name] for row in chunk])
                chunks[name].append(np.array([token for row in ids for token in (*row, vocabulary.eos_id)], np.int32))
                ends[name] += [len(row) + 1 for row in ids]
            bar.update(len(chunk))
    inputs, targets = (
        Ragged(np.concatenate([np.zeros(0, np.int32), *chunks[name]]), np.cumsum(ends[name], dtype=np.int64))
        for name in ("inputs", "targets")
    )
    examples = MemoryExamples(rows, inputs, targets, scoring)
    if only_texts:
        _tokenized[key] = examples
    return examples


def describe(function: Callable) -> dict[str, Any]:
    """Returns the name and options of a function or a partial of one, from which `rebuild` makes it in any process.

    Raises:
      ValueError: it is a local function or a lambda, or has positional options.
    """
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise ValueError(f"{function} has positional options: bind them by name so that a cache can record them")
        options = function.keywords | options
        function = function.func
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is local: move it to a module so that a cache can name it")
    return {"function": f"{function.__module__}:{function.__qualname__}", "options": options}


def rebuild(spec: Mapping[str, Any]) -> functools.partial:
    """Returns the function that `describe` described."""
    module, name = spec["function"].rsplit(":", 1)
    return functools.partial(getattr(importlib.import_module(module), name), **spec["options"])


def hash_of(*parts: Any) -> str:
    """Returns a hash of values that JSON can hold, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def texts_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a hash of the inputs and targets of rows, in order."""
    return hash_of([row["inputs"] for row in rows], [row["targets"] for row in rows])

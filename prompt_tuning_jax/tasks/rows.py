"""Defines sources of text rows that are tokenised in this process, checks their rows, and chooses their metrics.

SeqIO tasks do not use this module: `batches.build` tokenises them in a child process.
"""

import dataclasses
import functools
import json
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Texts
from prompt_tuning_jax.tasks import metrics, postprocessors

# The names of functions of `metrics`, by the kind of the answers.
OF_LABELS = ("accuracy", "f1", "mean_f1", "matthews")
OF_TEXTS = ("accuracy", "rouge")
OF_NUMBERS = ("pearson", "spearman")
DEFAULT_METRICS = ("accuracy",)  # for free text, this is exact match

Row = dict[str, Any]


@runtime_checkable
class RowSource(Protocol):
    """Returns the rows of a task's splits.

    Attributes:
      labels: the possible answers, if they are a closed set; None if answers are free text.
      metrics: names from `OF_LABELS`, `OF_TEXTS` or `OF_NUMBERS`; [] if only the loss is evaluated; None for accuracy.
    """

    @property
    def labels(self) -> Sequence[str] | None: ...
    @property
    def metrics(self) -> Sequence[str] | None: ...
    @property
    def splits(self) -> tuple[str, ...]:
        """Returns the names of the splits."""
        ...

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows of a whole split, each with "inputs" and "targets" as text, and with any other fields.

        Raises:
          ValueError: a row is invalid; the message says which.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Rows:
    """A `RowSource` of one split of rows in memory.

    The rows are checked and copied when this object is created, so later changes of the given rows have no effect.

    >>> source = Rows([{"inputs": "a dull film", "targets": 0}], labels=["bad", "good"])
    >>> source.rows("train")
    [{'inputs': 'a dull film', 'targets': 'bad'}]

    Attributes:
      given: mappings with the keys "inputs" and "targets", in any iterable that can be read twice. Both are text, or
        numbers, which are converted to text as in JSON. With `labels`, targets are labels or their indices.
      labels, metrics: as in `RowSource`.
      split: the name of the split.
    """

    given: Iterable[Any] = dataclasses.field(repr=False)
    labels: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    split: str = "train"

    def __post_init__(self):
        check_answers(self.labels, self.metrics)
        object.__setattr__(self, "given", [self._checked(index, row) for index, row in enumerate(self.given)])

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,)

    def rows(self, split: str) -> Sequence[Row]:
        del split
        return list(self.given)

    def _checked(self, index: int, row: Any) -> Row:
        if not isinstance(row, Mapping):
            found = reprlib.repr(row)
            raise ValueError(f"row {index} is {found}, expected a mapping with the keys 'inputs' and 'targets'")
        missing = [name for name in ("inputs", "targets") if name not in row]
        if missing:
            there = ", ".join(repr(name) for name in row) or "none"
            raise ValueError(f"row {index} has no {' and no '.join(map(repr, missing))}; its keys are {there}")
        try:
            target = target_of(row["targets"], self.labels, metrics=self.metrics)
            texts = {"inputs": text_of("inputs", row["inputs"]), "targets": target}
        except SettingError as error:
            raise SettingError(f"row {index}: ", *error.parts) from None
        return {**row, **texts}


def text_of(column: str, value: Any) -> str:
    """Returns a cell as text. Numbers are converted as in JSON.

    Raises:
      SettingError: the value is neither text nor a number, or is blank. The error names no setting.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(int(value) if isinstance(value, numbers.Integral) else float(value))
    if not isinstance(value, str) or not value.strip():
        raise SettingError(f"{column} is {reprlib.repr(value)}, expected some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        position = error.start + 1
        raise SettingError(f"{column} is no Unicode text: half of a surrogate pair at character {position}") from None
    return value


def target_of(
    value: Any, labels: Sequence[str] | None, column: str = "targets", metrics: Sequence[str] | None = None
) -> str:
    """Returns a target as text. With `labels`, a target is a label or the index of one, and the label is returned.

    A value that equals a label as text is that label. Other values count as indices only if no label is a number: with
    the labels '1' to '5', the value 0 is an error and does not mean the label '1'.

    >>> target_of(1, ["negative", "positive"]), target_of(1, ["1", "0"])
    ('positive', '1')

    Args:
      value: the cell.
      labels: the possible answers, or None.
      column: the name of the cell's column, for errors.
      metrics: as in `RowSource`. With a metric of numbers, the target must be a number.

    Raises:
      SettingError: the value is not valid text, or with `labels` neither a label nor an index.
    """
    if labels is None:
        text = text_of(column, value)
        if any(name in OF_NUMBERS for name in metrics or ()) and not _is_number(text):
            raise SettingError(
                f"{column} is {reprlib.repr(value)}, expected a finite number, which ", Setting("metrics"), " compares"
            )
        return text
    text = str(value) if isinstance(value, str | numbers.Real) and not isinstance(value, bool) else ""
    if text in labels:
        return text
    known = ", ".join(map(repr, labels))
    if any(map(_is_number, labels)):
        raise SettingError(
            f"{column} {reprlib.repr(value)} is not one of the labels {known}; it is not read as an index, because "
            "some labels are numbers: set ",
            Setting("labels"),
        )
    if text.isdecimal() and len(text) < 10 and text == str(int(text)) and int(text) < len(labels):
        return labels[int(text)]
    raise SettingError(
        f"{column} {reprlib.repr(value)} is not one of the labels {known}, nor the index of one: set ",
        Setting("labels"),
    )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_answers(labels: Texts | None, names: Texts | None) -> None:
    """Raises `SettingError` if labels or metrics are not lists of texts, or if a metric does not fit the labels."""
    if labels is not None:
        if isinstance(labels, str) or not isinstance(labels, Sequence):
            raise SettingError(Setting("labels"), f" is {labels!r}, expected a list of texts")
        if not labels or any(not isinstance(label, str) or not label.strip() for label in labels):
            raise SettingError(Setting("labels"), f" is {list(labels)!r}, expected texts that are not blank")
        if twice := [label for index, label in enumerate(labels) if label in labels[:index]]:
            raise SettingError(Setting("labels"), f" is {list(labels)!r}: {twice[0]!r} is there twice, expected once")
    if isinstance(names, str) or not isinstance(names, Sequence | None):
        raise SettingError(Setting("metrics"), f" is {names!r}, expected a list of names: [{names!r}]")
    scoring(labels, names)


def scoring(labels: Sequence[str] | None, names: Sequence[str] | None) -> tuple[Callable | None, list[Callable]]:
    """Returns the postprocessor of answers (None to keep the text unchanged) and the metrics of its results.

    Raises:
      SettingError: a metric does not exist, or does not exist for this kind of answers.
    """
    names = DEFAULT_METRICS if names is None else names
    known = OF_LABELS if labels else (*OF_TEXTS, *OF_NUMBERS)
    for name in names:
        if name not in known:
            raise SettingError(
                f"no metric {name!r} with{'' if labels else 'out'} ", Setting("labels"),
                f", there are {', '.join(known)}: set ", Setting("metrics"),
            )  # fmt: skip
    if labels:
        functions = [
            functools.partial(metrics.mean_f1, classes=len(labels)) if name == "mean_f1" else getattr(metrics, name)
            for name in names
        ]
        return functools.partial(postprocessors.label_index, labels=tuple(labels)), functions
    of_numbers = [name in OF_NUMBERS for name in names]
    if any(of_numbers) and not all(of_numbers):
        raise SettingError(
            f"{' and '.join(names)} cannot be combined, because some compare numbers and the others texts: set ",
            Setting("metrics"),
            " to metrics of one kind",
        )
    return postprocessors.number if any(of_numbers) else None, [getattr(metrics, name) for name in names]

"""Declares and checks the type and range of a setting, in the annotation of the field or argument that takes it.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     batch_size: Count = 32
    ...     labels: Texts | None = None
    >>> check_fields(Config(batch_size="16"))
    Traceback (most recent call last):
    prompt_tuning_jax.errors.SettingError: `batch_size` is '16', expected a whole number of at least 1; did you mean 16?

Values are checked, not converted: 2.0 and '2' are not whole numbers, and True is not a number. NumPy's numbers are
numbers.
"""

import abc
import contextlib
import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import numpy as np

from prompt_tuning_jax.errors import Setting, SettingError, near_misses

if TYPE_CHECKING:
    Int: TypeAlias = int
    Float: TypeAlias = float
    FloatOrSchedule: TypeAlias = float | Callable[..., Any]
    Str: TypeAlias = str
    Bool: TypeAlias = bool
    ListOfTexts: TypeAlias = Sequence[str]
    ListOfInts: TypeAlias = Sequence[int]
    Sizes: TypeAlias = Mapping[str, int]
    Settings: TypeAlias = Mapping[str, Any]
    AnyFunction: TypeAlias = Callable[..., Any]
else:  # annotations that are checked when a function is called must not refuse values before `check` can explain
    Int = Float = FloatOrSchedule = Str = Bool = ListOfTexts = ListOfInts = Sizes = Settings = AnyFunction = Any


INT32, FLOAT32 = 2**31 - 1, 3.4028234e38  # the largest numbers that the computations' dtypes can hold


class Kind(abc.ABC):
    """Says which values are accepted.

    Attributes:
      expected: the accepted values in words, for the message.
    """

    expected: str

    @abc.abstractmethod
    def fault(self, value: Any, optional: bool = False) -> str | None:
        """Returns the message about an invalid value, without the setting's name in front; None if it is accepted.

        Args:
          optional: whether the message says that None would be accepted, too.
        """

    def accepts(self, value: Any) -> bool:
        return self.fault(value) is None

    def refused(self, value: Any, optional: bool, hint: str = "") -> str:
        """Returns the usual message without the setting's name: found, expected, near miss."""
        return f" is {shown(value)}, expected {self.expected}{' or None' if optional else ''}{hint}"


@dataclasses.dataclass(frozen=True)
class Number(Kind):
    """Accepts a finite number in a range.

    Attributes:
      integer: whether it must be a whole number.
      least, most: ends that belong to the range; None if there is no such end.
      above, below: ends that do not belong to the range; None if there is no such end.
      which: says in the message what `most` is, such as "the width of the model".
      schedule: whether a function of the step is accepted, too.
    """

    integer: bool = False
    least: float | int | None = None
    most: float | int | None = None
    above: float | int | None = None
    below: float | int | None = None
    which: str = ""
    schedule: bool = False

    @property
    def expected(self) -> str:
        kind = "a whole number" if self.integer else "a number"
        if self.least is not None and self.most is not None:
            kind += f" from {self.least} to {self.most}"
        elif self.least is not None and self.below is not None:
            kind += f" in [{self.least}, {self.below})"
        elif self.above is not None and self.most is not None:
            kind += f" above {self.above} and of at most {self.most}"
        else:
            kind = kind if self.integer else "a finite number"
            kind += "" if self.least is None else f" of at least {self.least}"
            kind += "" if self.above is None else f" above {self.above}"
        return kind + (f", {self.which}" if self.which else "") + (", or a schedule" if self.schedule else "")

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if self._in_range(value) or (self.schedule and callable(value) and not isinstance(value, type)):
            return None
        meant = _as_number(value)
        if meant is not None and self._in_range(meant):
            return self.refused(value, optional, f"; did you mean {meant!r}?")
        known = int if self.integer else (int, float)
        if isinstance(value, known) and self.most is self.below is None and self._largest < value < math.inf:
            return f" is {shown(value)}, expected at most {self._largest:.10g}, which {self._dtype} can hold"
        return self.refused(value, optional)

    @property
    def _dtype(self) -> str:
        return "int32" if self.integer else "float32"

    @property
    def _largest(self) -> float | int:
        return max(INT32, self.most or 0) if self.integer else FLOAT32

    def _in_range(self, value: Any) -> bool:
        if hasattr(value, "aval") and value.shape == ():  # a scalar of JAX
            try:
                value = np.asarray(value)[()]
            except TypeError:  # traced: it has no value yet
                return True
        kinds = (int, np.integer) if self.integer else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
            return False
        return bool(abs(value) <= self._largest) and not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


def _as_number(value: Any) -> int | float | None:
    """Returns the number that a text or a float such as 2.0 was probably meant to be; None if there is none."""
    if isinstance(value, str):
        value = number_in(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value


def number_in(text: str) -> int | float | None:
    """Returns the number that a text is; None if it is none.

    >>> number_in("16"), number_in("1e-5"), number_in("many")
    (16, 1e-05, None)
    """
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None


@dataclasses.dataclass(frozen=True)
class OneOf(Kind):
    """Accepts one of some values, of the same type."""

    values: tuple[Any, ...]

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(map(repr, self.values))

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if any(type(value) is type(item) and value == item for item in self.values):
            return None
        texts = [item for item in self.values if isinstance(item, str)]
        hint = near_misses(value, texts, shown=repr, otherwise="") if isinstance(value, str) else ""
        return self.refused(value, optional, f"; {hint}" if hint else "")


@dataclasses.dataclass(frozen=True)
class String(Kind):
    """Accepts a text.

    Attributes:
      blank: whether the text may be empty or only blanks.
    """

    blank: bool = True

    @property
    def expected(self) -> str:
        return "a text" if self.blank else "a text that is not blank"

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if isinstance(value, str) and (self.blank or value.strip()):
            return None
        return self.refused(value, optional)


@dataclasses.dataclass(frozen=True)
class ListOf(Kind):
    """Accepts a list or tuple of values of one kind.

    Attributes:
      of: the kind of each value.
      several: what many such values are called, such as "texts".
    """

    of: Kind
    several: str

    @property
    def expected(self) -> str:
        return f"a list of {self.several}"

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            hint = f"; did you mean [{shown(value)}]?" if self.of.accepts(value) else ""
            return self.refused(value, optional, hint)
        for index, item in enumerate(value):
            if fault := self.of.fault(item):
                return f"[{index}]{fault}"
        return None


@dataclasses.dataclass(frozen=True)
class KnownKeys(Kind):
    """Accepts a mapping with known keys.

    Attributes:
      of: the kind of each key's value.
      all_keys: whether all keys must be present.
    """

    of: tuple[tuple[str, Kind], ...]
    all_keys: bool

    @property
    def expected(self) -> str:
        return f"a mapping with the keys {self._keys}"

    @property
    def _keys(self) -> str:
        return (" and " if self.all_keys else " or ").join(repr(key) for key, _ in self.of)

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if not isinstance(value, Mapping):
            return self.refused(value, optional)
        known = dict(self.of)
        for key in value:
            if key not in known:
                hint = near_misses(str(key), known, shown=repr, otherwise="")
                return f" has the key {shown(key)}, expected {self._keys}" + (f"; {hint}" if hint else "")
        for key, kind in known.items():
            if key not in value:
                if self.all_keys:
                    return f" has no key {key!r}, expected {self._keys}"
            elif fault := kind.fault(value[key]):
                return f"[{key!r}]{fault}"
        return None


@dataclasses.dataclass(frozen=True)
class MappingOf(Kind):
    """Accepts a mapping with any keys.

    Attributes:
      of: the kind of the values; None for any values.
      texts: whether the keys must be texts.
    """

    of: Kind | None = None
    texts: bool = True

    @property
    def expected(self) -> str:
        return "a mapping with texts as keys" if self.texts else "a mapping"

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if not isinstance(value, Mapping) or (self.texts and not all(isinstance(key, str) for key in value)):
            return self.refused(value, optional)
        for key, item in value.items():
            if self.of is not None and (fault := self.of.fault(item)):
                return f"[{key!r}]{fault}"
        return None


class Function(Kind):
    """Accepts a function or callable object, but not a class: usually its parentheses were forgotten."""

    expected = "a function"

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if callable(value) and not isinstance(value, type):
            return None
        hint = f"; did you mean {value.__name__}(...)?" if isinstance(value, type) else ""
        return self.refused(value, optional, hint)


@dataclasses.dataclass(frozen=True)
class InstanceOf(Kind):
    """An object of a class, which has settings of its own.

    Attributes:
      of: the class.
    """

    of: type

    @property
    def expected(self) -> str:
        return f"a {self.of.__name__}"

    def fault(self, value: Any, optional: bool = False) -> str | None:
        if isinstance(value, self.of):
            return None
        hint = f"; did you mean {self.of.__name__}(...)?" if value is self.of else ""
        return self.refused(value, optional, hint)


def integer(least: int, most: int | None = None, which: str = "") -> Number:
    """Returns the kind of whole numbers from `least` to `most`; `which` says what `most` is."""
    return Number(integer=True, least=least, most=most, which=which)


# The kinds of settings, as annotations.
Count = Annotated[Int, integer(1)]
Natural = Annotated[Int, integer(0)]
Seed = Annotated[Int, Number(integer=True, least=0, most=2**32 - 1)]  # the seeds that NumPy accepts
Finite = Annotated[Float, Number()]
Positive = Annotated[Float, Number(above=0)]
NotNegative = Annotated[Float, Number(least=0)]
Share = Annotated[Float, Number(least=0, below=1)]
# A larger rate would give numbers whose squares overflow float32.
Peak = Annotated[Float, Number(above=0, most=1_000_000)]
Rate = Annotated[FloatOrSchedule, Number(above=0, most=1_000_000, schedule=True)]
Text = Annotated[Str, String()]
Name = Annotated[Str, String(blank=False)]
Texts = Annotated[ListOfTexts, ListOf(String(), "texts")]
Counts = Annotated[ListOfInts, ListOf(integer(1), "whole numbers of at least 1")]
Switch = Annotated[Bool, OneOf((True, False))]
Callback = Annotated[AnyFunction, Function()]
# A target of one token would be only the end of sequence.
Lengths = Annotated[Sizes, KnownKeys((("inputs", integer(1)), ("targets", integer(2))), all_keys=True)]


def check(name: str, value: Any, annotation: Any) -> None:
    """Raises SettingError if a setting's annotation does not accept a value.

    Args:
      name: the setting's canonical name.
      annotation: a `Kind`, one of this module's annotations, or such an annotation `| None`. Any other annotation
        accepts every value.
    """
    if fault := fault_of(value, annotation):
        raise SettingError(Setting(name), fault)


def fault_of(value: Any, annotation: Any) -> str | None:
    """Returns the end of the message about a value, as `Kind.fault`; None if it is what the annotation says."""
    kind, optional = _kind_of(annotation)
    if kind is None or (optional and value is None):
        return None
    return kind.fault(value, optional)


def accepts(value: Any, annotation: Any) -> bool:
    """Returns whether an annotation accepts a value."""
    return fault_of(value, annotation) is None


def check_values(declared: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raises SettingError if the annotation of a field or argument does not accept the value with its name.

    Args:
      declared: the dataclass or function with these fields or arguments.
      values: the values by name. Names that `declared` does not have are ignored.
    """
    for name, annotation in annotations_of(declared).items():
        if name in values:
            check(name, values[name], annotation)


def check_fields(made: Any) -> None:
    """Raises SettingError if a field of a dataclass instance has a value that its annotation does not accept."""
    check_values(type(made), {field.name: getattr(made, field.name) for field in dataclasses.fields(made)})


def keep_plain(made: Any) -> None:
    """Replaces NumPy and JAX numbers in a dataclass's settings by Python numbers, which can be written as JSON."""
    for name in annotations_of(type(made)):
        value = getattr(made, name)
        if isinstance(value, np.generic) or (hasattr(value, "aval") and value.shape == ()):
            object.__setattr__(made, name, value.item())


@functools.cache
def annotations_of(declared: Callable[..., Any]) -> dict[str, Any]:
    """Returns the annotations that have a `Kind`, by the name of the field or argument."""
    if dataclasses.is_dataclass(declared):
        found = {field.name: field.type for field in dataclasses.fields(declared)}
    else:
        found = {name: item.annotation for name, item in inspect.signature(declared).parameters.items()}
    return {name: annotation for name, annotation in found.items() if _kind_of(annotation)[0] is not None}


def _kind_of(annotation: Any) -> tuple[Kind | None, bool]:
    """Returns an annotation's kind, or None if it has none; and whether the value None is accepted, too."""
    if isinstance(annotation, Kind):
        return annotation, False
    parts = get_args(annotation)
    for item in (annotation, *parts):
        for kind in getattr(item, "__metadata__", ()):
            if isinstance(kind, Kind):
                return kind, type(None) in parts
    return None, False


def shown(value: Any) -> str:
    """Returns the repr of a value in one line, truncated to 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deep, or an int of more digits than Python writes
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_path(value: Any) -> Any:
    """Returns a path as text, and any other value unchanged, so that a check can refuse it."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def as_tuple(value: Any) -> Any:
    """Returns a list as a tuple, and any other value unchanged, so that a check can refuse it."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value

"""A sweep: a grid of settings over gin files, and the trials that it stands for. Nothing here runs anything."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.settings import (
    Count,
    Dictionary,
    Listing,
    Name,
    OneOf,
    Settings,
    Str,
    Texts,
    accepts,
    check,
    check_fields,
    shown,
)

LONGEST_VALUE = 60  # characters of a value in a trial's name
COMMANDS = ("train", "eval")
CHOICES = Dictionary(Dictionary(Dictionary(), texts=False))  # macros by axis and value
GRIDS = Listing(Dictionary(), "grids")


class Trial(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: its place in the grid, "SIZE=nano,PROMPT_LENGTH=5": unique in the sweep, and its folder's name.
      command: "train" or "eval".
      gin_files: in order.
      macros: values by macro, MODEL_DIR among them.
      texts: bindings given on the sweep's command line, "NAME=value" as typed.
      values: by axis, as `name` has them.
    """

    name: str
    command: str
    gin_files: tuple[str, ...]
    macros: Mapping[str, Any]
    texts: tuple[str, ...]
    values: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.macros["MODEL_DIR"])

    @property
    def arguments(self) -> list[str]:
        """What its command line is given."""
        return [
            *(f"--gin_file={file}" for file in self.gin_files),
            *(f"--gin.{name}={value!r}" for name, value in self.macros.items()),
            *(f"--gin.{text}" for text in self.texts),
        ]

    @property
    def command_line(self) -> list[str]:
        return ["python", "-m", f"prompt_tuning_jax.{self.command}", *self.arguments]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep's gin file says.

    An axis of the grid is a macro and its values, or a name of one's own whose values are `choices`. A text among the
    macros may hold "{AXIS}", which stands for the trial's value of that axis, as its name has it.

    Attributes:
      sweep_dir: SWEEP_DIR. Each trial's MODEL_DIR is the folder of its name in it.
      grid: values by axis; every combination is a trial. Or several such grids, one after another, as in
        scikit-learn's `ParameterGrid`.
      gin_files: of every trial, after those of its choices.
      macros: of every trial, before those of its choices.
      choices: by axis and value, what that value stands for: macros, "gin_files" (a list) and "command".
      command: of the trials whose choices name none: "train" or "eval".
      vectorize: 'auto'; False for a process a trial; or how many trials are to share a forward and a backward pass,
        however much they pad each other (see `run_groups.programs`).
      seeds: the axis that tables give the mean and standard deviation over.
      mean_over: an axis (of tasks) that tables also give the mean over; None for no such rows.
    """

    sweep_dir: Name
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]] | Any
    gin_files: Texts = ()
    macros: Annotated[Settings, Dictionary()] = dataclasses.field(default_factory=dict)
    choices: Annotated[Settings, CHOICES] = dataclasses.field(default_factory=dict)
    command: Annotated[Str, OneOf(COMMANDS)] = "train"
    vectorize: bool | int | str | Any = "auto"
    seeds: Name = "RANDOM_SEED"
    mean_over: Name | None = None

    def trials(self, texts: Sequence[str] = ()) -> list[Trial]:
        """The trials, in the order of the grid: the last axis changes fastest.

        Args:
          texts: bindings for every trial, "NAME=value", over what the sweep's file says.

        Raises:
          ValueError: `vectorize` is none of its values, the grid is empty, a value is not among its axis's choices, or
            two trials have one name.
        """
        check_fields(self)
        many = self.vectorize
        if many != "auto" and not isinstance(many, bool) and not accepts(many, Count):
            raise SettingError(
                Setting("vectorize"), f" is {many!r}, expected 'auto', False, or how many trials to train at once"
            )
        grids = [self.grid] if isinstance(self.grid, Mapping) else self.grid
        if not accepts(grids, GRIDS):
            raise SettingError(
                Setting("grid"),
                f" is {shown(self.grid)}, expected lists of values by axis, or a list of such grids",
            )
        if not grids or not all(grids):
            raise ValueError("the sweep's grid is empty: set Sweep.grid to values by axis")
        for axis in (axis for grid in grids for axis in grid):
            if axis in (text.partition("=")[0] for text in texts):
                raise ValueError(
                    f"{axis} is an axis of this sweep's grid: change its values there, not with --gin.{axis}"
                )
        trials: dict[str, Trial] = {}
        for grid in grids:
            for axis, values in grid.items():
                self._check_axis(axis, values)
            for point in itertools.product(*grid.values()):
                trial = self._trial(dict(zip(grid, point, strict=True)), texts)
                if trial.name in trials:
                    raise ValueError(f"two trials are called {trial.name}: give each combination of values once")
                trials[trial.name] = trial
        return list(trials.values())

    def _check_axis(self, axis: str, values: Any) -> None:
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"axis {axis} of the sweep's grid is {values!r}, expected a list of values")
        known = self.choices.get(axis)
        for value in values:
            if known is not None and (not isinstance(value, Hashable) or value not in known):
                hint = near_misses(str(value), map(str, known), shown=repr)
                raise ValueError(f"axis {axis} has no choice {value!r}; {hint}")

    def _trial(self, point: Mapping[str, Any], texts: Sequence[str]) -> Trial:
        values = {axis: value_name(value) for axis, value in point.items()}
        name = ",".join(f"{axis}={value}" for axis, value in values.items())
        files, macros, command = [], dict(self.macros), self.command
        for axis, value in point.items():
            if axis not in self.choices:
                macros[axis] = value
                continue
            choice = dict(self.choices[axis][value])
            own = choice.pop("gin_files", [])
            check("gin_files", own, Texts)
            files += own
            command = choice.pop("command", command)
            macros |= choice
        if command not in COMMANDS:
            raise ValueError(f"a choice's command is {command!r}, expected one of {', '.join(COMMANDS)}")
        macros = {key: _filled(value, values) for key, value in macros.items()}
        macros["MODEL_DIR"] = str(Path(self.sweep_dir, name))
        return Trial(name, command, (*files, *self.gin_files), macros, tuple(texts), values)


def value_name(value: Any) -> str:
    """A value as a trial's name has it: what a folder's name can bear, and no `,` `=` `:` that names are cut at."""
    text = re.sub(r"[^\w.+-]+", "_", str(value)).strip("_") or "none"
    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]}-{hashlib.sha256(str(value).encode()).hexdigest()[:8]}"
    return text


def chosen(trials: Iterable[Trial], names: Sequence[str]) -> list[Trial]:
    """The trials of these names, in their order.

    Raises:
      ValueError: there is no trial of such a name.
    """
    by_name = {trial.name: trial for trial in trials}
    for name in names:
        if name not in by_name:
            hint = near_misses(name, by_name, otherwise=f"they are like {next(iter(by_name))}")
            raise ValueError(f"no trial {name} in this sweep; {hint}")
    return [by_name[name] for name in names]


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """The value with "{AXIS}" in its texts replaced by the trial's value of that axis; other braces stand."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {key: _filled(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, values) for item in value)
    return value

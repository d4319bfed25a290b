"""Defines a sweep, which is a grid of settings over gin files, and lists its trials. Nothing here runs a trial."""

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
    ListOf,
    MappingOf,
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

LONGEST_VALUE = 60  # how many characters of a value a trial's name keeps
COMMANDS = ("train", "eval")
CHOICES = MappingOf(MappingOf(MappingOf(), texts=False))  # macros by axis and value
GRIDS = ListOf(MappingOf(), "grids")


class Trial(NamedTuple):
    """Describes one run of a sweep.

    Attributes:
      name: its value on each axis of the grid, such as "SIZE=nano,PROMPT_LENGTH=5". It is unique in the sweep, and is
        also the name of the trial's folder.
      command: "train" or "eval".
      gin_files: the gin files, in the order in which they are parsed.
      macros: values by macro, including MODEL_DIR.
      texts: bindings from the sweep's command line, "NAME=value" as typed.
      values: the trial's value by axis, written as in `name`.
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
        """Returns the arguments of the trial's command line."""
        return [
            *(f"--gin_file={file}" for file in self.gin_files),
            *(f"--gin.{name}={value!r}" for name, value in self.macros.items()),
            *(f"--gin.{text}" for text in self.texts),
        ]

    @property
    def command_line(self) -> list[str]:
        return ["python", "-m", f"prompt_tuning_jax.{self.command}", *self.arguments]

    @property
    def train_steps(self) -> int | None:
        """Returns TRAIN_STEPS, or None if the arguments do not set it: a gin file may, and an evaluation has none."""
        return next(filter(None, map(train_steps, reversed(self.arguments))), None)


def train_steps(argument: str) -> int | None:
    """Returns TRAIN_STEPS if this is the argument that sets it, otherwise None."""
    found = re.fullmatch(r"--gin\.TRAIN_STEPS=([\d_]+)", argument)
    return int(found[1].replace("_", "")) if found else None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Holds the settings of a sweep's gin file.

    An axis of the grid is either a macro with its values, or a new name with values that `choices` defines. A text in
    `macros` may contain "{AXIS}", which is replaced by the trial's value on that axis, written as in the trial's name.

    Attributes:
      sweep_dir: SWEEP_DIR. Each trial's MODEL_DIR is a folder in it that has the trial's name.
      grid: values by axis; every combination is a trial. It may also be a list of such grids, whose trials are
        concatenated, as in scikit-learn's `ParameterGrid`.
      gin_files: gin files of every trial, parsed after those of its choices.
      macros: macros of every trial, which its choices override.
      choices: by axis and value, the settings that the value stands for: macros, "gin_files" (a list) and "command".
      command: "train" or "eval", for the trials with choices that do not set it.
      vectorize: 'auto'; False for one process per trial; or the number of trials that are vmapped into one forward and
        backward pass, however much padding that needs (see `run_groups.programs`).
      seeds: the axis over which tables give the mean and the standard deviation.
      mean_over: an axis (of tasks) over which tables also give the mean; None for no such rows.
    """

    sweep_dir: Name
    grid: Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]] | Any
    gin_files: Texts = ()
    macros: Annotated[Settings, MappingOf()] = dataclasses.field(default_factory=dict)
    choices: Annotated[Settings, CHOICES] = dataclasses.field(default_factory=dict)
    command: Annotated[Str, OneOf(COMMANDS)] = "train"
    vectorize: bool | int | str | Any = "auto"
    seeds: Name = "RANDOM_SEED"
    mean_over: Name | None = None

    def trials(self, texts: Sequence[str] = ()) -> list[Trial]:
        """Returns the trials in the order of the grid, in which the last axis changes fastest.

        Args:
          texts: bindings for every trial, "NAME=value", which override the sweep's file.

        Raises:
          ValueError: `vectorize` is invalid, the grid is empty, a value is not among its axis's choices, or two trials
            have the same name.
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
    """Returns a value as written in a trial's name, which is a folder's name and is split at `,`, `=` and `:`."""
    text = re.sub(r"[^\w.+-]+", "_", str(value)).strip("_") or "none"
    if len(text) > LONGEST_VALUE:
        text = f"{text[:LONGEST_VALUE]}-{hashlib.sha256(str(value).encode()).hexdigest()[:8]}"
    return text


def chosen(trials: Iterable[Trial], names: Sequence[str]) -> list[Trial]:
    """Returns the trials with these names, in the order of `names`.

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
    """Replaces each "{AXIS}" in the value's texts by the trial's value on that axis; other braces are kept."""
    if isinstance(value, str):
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {key: _filled(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(item, values) for item in value)
    return value

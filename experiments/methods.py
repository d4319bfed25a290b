"""Compares methods: chooses the trials of a sweep to run next, and writes a page and a figure of the finished trials.

    python -m experiments.methods --next --gin_file=sweeps/methods.gin --gin.DATA_DIR="'path/to/data'"
    python -m experiments.methods --collect --gin_file=sweeps/methods.gin --gin.DATA_DIR="'path/to/data'"
    python -m experiments.methods --page --gin_file=sweeps/methods.gin

The sweep is sweeps/methods.gin, with all methods, or sweeps/fast.gin, with short runs and the official recipe. `--next`
prints the trials to run next, in the form for `sweep --only=`. For each method and task, these are first all learning
rates with the first seed, and when these are finished, the other seeds with the best learning rate. `--collect`
predicts the rows of the finished trials again, with the parameters of their best evaluation, and writes to
experiments/results/NAME.csv which predictions are correct; NAME is the sweep's name. `--page` writes NAME.md and
NAME.png from only this file.
"""

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gin
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from experiments.answers import Runs
from experiments.drawing import COLOURS
from experiments.intervals import DRAWS, Interval, bootstrap
from experiments.trials import evaluations
from prompt_tuning_jax import gin_files
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.sweeps import spec
from prompt_tuning_jax.training.evaluation import is_right

RESULTS = Path(__file__).parent / "results"
FLAGS = ("next", "collect", "page")
PLAIN = "official"  # the method that the others are compared with
COLUMNS = ("METHOD", "SIZE", "TASK", "LEARNING_RATE", "RANDOM_SEED", "accuracy", "best_step", "steps", "curve")
COLUMNS += ("trainable_parameters", "stored_bytes", "rows", "right", "base_fingerprint")
INTERVALS = (
    f"The brackets hold the middle 95% of {DRAWS:,} bootstrap draws over rows and seeds. "
    f'The column "less {PLAIN}" has the accuracy minus that of the official recipe of prompt tuning on the same rows. '
    'It says "none" if the interval contains 0, because these rows and seeds then show no difference. '
    "If there is no true difference, about one interval in twenty leaves out 0 by chance. "
    "The embedded model writes MRPC's label `not_equivalent` with an unknown token."
)
ABOUT = {
    "methods": "# The methods on real tasks\n\n"
    "The tables show the accuracy of generated answers in per cent on held-out training rows, at each run's best "
    "evaluation, as the mean over the seeds. Each method had the same number of learning rates. They were tried with "
    f"the first seed, and the best one was then run with the other seeds. {INTERVALS} "
    "On MRPC, a method whose difference is 0.0 [0.0, 0.0] answers `equivalent` to every row, as the official recipe "
    "does. The rows that are scored also choose the learning rate and the step, so all scores are a little too high.",
    "fast": "# Short runs against the official recipe\n\n"
    "The official recipe with 160 steps is compared with `runs/prompt_tune_fast.gin` with 32 steps. The tables show "
    "the accuracy of generated answers in per cent after the last step, as the mean over the seeds, on rows that chose "
    "neither a recipe nor a step. "
    f"{INTERVALS} "
    "Neither recipe learns to write the labels of MRPC with every seed. On BoolQ both give the majority answer.",
}


class TrialResult(NamedTuple):
    """Holds the results of a finished trial.

    Attributes:
      curve: the accuracy at each evaluated step.
      stored_bytes: the size of the trial's folder `best/`.
      right: whether each row's prediction is correct, at the best evaluation.
    """

    method: str
    size: str
    task: str
    rate: str
    seed: int
    curve: Mapping[int, float]
    best_step: int
    steps: int
    trainable_parameters: int
    stored_bytes: int
    right: Bool[np.ndarray, " N"]
    base_fingerprint: str

    @property
    def accuracy(self) -> float:
        return 100.0 * float(self.right.mean())


def steps_to(curve: Mapping[int, float], share: float = 0.99) -> int:
    """Returns the first evaluated step whose score is at least `share` of the best one."""
    best = max(curve.values())
    return min(step for step, score in curve.items() if score >= share * best)


def curve_of(folder: Path) -> dict[int, float]:
    """Returns a run's accuracy by step."""
    return {record["step"]: record["accuracy"] for record in evaluations(folder)}


def next_trials(trials: Sequence[spec.Trial], scores: Mapping[str, float]) -> list[spec.Trial]:
    """Returns the trials to run next.

    Args:
      trials: all trials of the sweep.
      scores: the scores of the finished trials, by name.
    """

    def cell(trial: spec.Trial) -> tuple[str, ...]:
        return tuple(value for axis, value in trial.values.items() if axis not in ("LEARNING_RATE", "RANDOM_SEED"))

    chosen = []
    for _, group in itertools.groupby(trials, key=cell):
        members = list(group)
        first = [trial for trial in members if trial.values["RANDOM_SEED"] == members[0].values["RANDOM_SEED"]]
        if all(trial.name in scores for trial in first):
            best = max(first, key=lambda trial: scores[trial.name])  # if scores are equal, the first of the grid
            first = [trial for trial in members if trial.values["LEARNING_RATE"] == best.values["LEARNING_RATE"]]
        chosen += [trial for trial in first if trial.name not in scores]
    return chosen


def sweep_of(argv: Sequence[str]) -> str:
    """Returns the name of the one sweep that the command line names.

    Raises:
      ValueError: the command line names no sweep, several, or one that has no page.
    """
    names = [Path(argument.partition("=")[2]).stem for argument in argv if argument.startswith("--gin_file=")]
    if len(names) != 1 or names[0] not in ABOUT:
        known = " or ".join(f"--gin_file=sweeps/{name}.gin" for name in ABOUT)
        raise SettingError(f"{', '.join(names) or 'no sweep'} given, expected {known}")
    return names[0]


def settings_of(argv: Sequence[str]) -> tuple[spec.Sweep, list[spec.Trial]]:
    """Returns the sweep that `sweep ARGV` runs, and its trials."""
    own, texts = gin_files.split_bindings(argv, FLAGS, __doc__)
    gin_files.parse(own, FLAGS)
    settings = gin_files.configured(spec.Sweep, f"sweeps/{sweep_of(argv)}.gin")()
    gin.clear_config()
    return settings, settings.trials(texts)


def finished_scores(trials: Iterable[spec.Trial]) -> dict[str, float]:
    """Returns the best accuracy of the trials that are finished, by name."""
    return {
        trial.name: json.loads((trial.folder / "summary.json").read_text())["best"]["accuracy"]
        for trial in trials
        if (trial.folder / "summary.json").is_file()
    }


def collect(trials: Sequence[spec.Trial]) -> list[TrialResult]:
    """Predicts the rows of the finished trials again, and returns the trials' results."""
    runs, found = Runs(), []
    for trial in trials:
        if not (trial.folder / "summary.json").is_file():
            continue
        summary = json.loads((trial.folder / "summary.json").read_text())
        _, predictions = runs.predictions(trial.folder, trial.folder)
        right = np.array([is_right(*pair) for pair in zip(predictions.targets, predictions.answers, strict=True)])
        said = summary["best"]["accuracy"]
        if abs(100.0 * right.mean() - said) > 1e-6:
            raise ValueError(f"{trial.name} answers {100.0 * right.mean()} right, its summary says {said}")
        values = trial.values
        found.append(
            TrialResult(
                values["METHOD"],
                values["SIZE"],
                values["TASK"],
                values["LEARNING_RATE"],
                int(values["RANDOM_SEED"]),
                curve_of(trial.folder),
                summary["best_step"],
                summary["steps"],
                summary["trainable_parameters"],
                sum(path.stat().st_size for path in (trial.folder / "best").rglob("*") if path.is_file()),
                right,
                summary["base_fingerprint"],
            )
        )
        print(f"{trial.name}: {found[-1].accuracy:.1f}", file=sys.stderr)
    return found


def to_csv(found: Sequence[TrialResult], path: Path) -> None:
    """Writes one row per trial. "right" has one bit per row of data, the first in the highest bit, in hexadecimal."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in found:
            bits = np.packbits(one.right).tobytes().hex()
            curve = " ".join(f"{step}:{score:.10g}" for step, score in one.curve.items())
            writer.writerow(
                [one.method, one.size, one.task, one.rate, one.seed, f"{one.accuracy:.4f}", one.best_step, one.steps]
                + [curve, one.trainable_parameters, one.stored_bytes, len(one.right), bits]
                + [one.base_fingerprint]
            )


def from_csv(path: Path) -> list[TrialResult]:
    """Reads a file that `to_csv` wrote."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8), count=int(row["rows"]))
            found.append(
                TrialResult(
                    row["METHOD"],
                    row["SIZE"],
                    row["TASK"],
                    row["LEARNING_RATE"],
                    int(row["RANDOM_SEED"]),
                    {int(step): float(score) for step, score in (pair.split(":") for pair in row["curve"].split())},
                    int(row["best_step"]),
                    int(row["steps"]),
                    int(row["trainable_parameters"]),
                    int(row["stored_bytes"]),
                    bits.astype(bool),
                    row["base_fingerprint"],
                )
            )
    return found


class Cell(NamedTuple):
    """Holds the runs of a method on a task, with the chosen learning rate, one per seed."""

    runs: list[TrialResult]
    tried: int  # the number of learning rates that were tried

    @property
    def right(self) -> Float[np.ndarray, "S N"]:
        return 100.0 * np.stack([run.right for run in self.runs]).astype(np.float64)


def cells(found: Sequence[TrialResult]) -> dict[tuple[str, str, str], Cell]:
    """Returns the runs at the learning rate whose first seed was best, by size, task and method."""
    grouped: dict[tuple[str, str, str], list[TrialResult]] = {}
    for one in found:
        grouped.setdefault((one.size, one.task, one.method), []).append(one)
    chosen = {}
    for key, runs in grouped.items():
        first = [run for run in runs if run.seed == min(run.seed for run in runs)]
        rate = max(first, key=lambda run: run.accuracy).rate
        chosen[key] = Cell(sorted((run for run in runs if run.rate == rate), key=lambda run: run.seed), len(first))
    return chosen


def table(found: Sequence[TrialResult], size: str, task: str) -> str:
    """Returns a task's table in Markdown, the best method first."""
    of_task = {method: cell for (one, other, method), cell in cells(found).items() if (one, other) == (size, task)}
    plain = of_task.get(PLAIN)
    lines = [
        f"| method | learning rate | seeds | accuracy | less {PLAIN} | steps to 99% | trained | stored bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, cell in sorted(of_task.items(), key=lambda item: -item[1].right.mean()):
        over = difference(cell, plain)
        said = "" if over is None else str(over) if over.excludes_zero else f"{over}: none"
        run = cell.runs[0]
        steps = ", ".join(str(steps_to(one.curve)) for one in cell.runs)
        lines.append(
            f"| {method} | {run.rate} of {cell.tried} | {len(cell.runs)} | {bootstrap(cell.right)} | {said} "
            f"| {steps} | {run.trainable_parameters:,} | {run.stored_bytes:,} |"
        )
    return "\n".join(lines)


def difference(cell: Cell, plain: Cell | None) -> Interval | None:
    """Returns the difference to the official recipe; None for the recipe itself, or if not all seeds are there."""
    if plain is None or cell is plain or len(cell.runs) != len(plain.runs):
        return None
    return bootstrap(cell.right - plain.right)


def verdict(found: Sequence[TrialResult], size: str, task: str) -> str:
    """Returns sentences that say which methods are better or worse than the official recipe, and which are neither."""
    of_task = {method: cell for (one, other, method), cell in cells(found).items() if (one, other) == (size, task)}
    better, worse, none = [], [], []
    for method, cell in of_task.items():
        over = difference(cell, of_task.get(PLAIN))
        if over is not None:
            (better if over.low > 0 else worse if over.high < 0 else none).append(method)
    said = {f"Better than {PLAIN}": better, f"Worse than {PLAIN}": worse, f"No difference to {PLAIN}": none}
    return " ".join(f"{name}: {', '.join(methods) or 'no method'}." for name, methods in said.items())


def page(name: str, found: Sequence[TrialResult]) -> str:
    """Returns the page of a sweep in Markdown."""
    command = f"python -m experiments.methods --page --gin_file=sweeps/{name}.gin"
    parts = [ABOUT[name], f"Written by `{command}` from {name}.csv.", f"![accuracy by method]({name}.png)"]
    for size, task in dict.fromkeys((one.size, one.task) for one in found):
        of_task = [one for one in found if (one.size, one.task) == (size, task)]
        steps = sorted({one.steps for one in of_task})
        parts.append(f"## {task}, {size}: {len(of_task[0].right):,} rows, {' or '.join(map(str, steps))} steps")
        parts += [verdict(found, size, task), table(found, size, task)]
    return "\n\n".join(parts) + "\n"


def draw(found: Sequence[TrialResult], size: str) -> Figure:
    """Draws two panels per task: each method's difference to the official recipe, and the accuracy at each step.

    The differences have their bootstrap intervals. The accuracies are means over the seeds.
    """
    of_size = {key[1:]: cell for key, cell in cells(found).items() if key[0] == size}
    tasks, methods = ([*dict.fromkeys(key[index] for key in of_size)] for index in (0, 1))
    figure = Figure(figsize=(3.6 * len(tasks) + 1.2, 2.2 + 0.26 * len(methods) + 2.6), layout="constrained")
    rows = figure.subplots(2, len(tasks), squeeze=False, height_ratios=[1.2 + 0.26 * len(methods), 2.6])
    for task, above, below in zip(tasks, *rows, strict=True):
        plain = of_size.get((task, PLAIN))
        for index, method in enumerate(methods):
            cell = of_size.get((task, method))
            if cell is None or plain is None or len(cell.runs) != len(plain.runs):
                continue
            colour = COLOURS[6] if method == PLAIN else COLOURS[0]
            over = difference(cell, plain)
            if over is not None:
                bars = [[over.mean - over.low], [over.high - over.mean]]
                above.errorbar([over.mean], [index], xerr=bars, fmt="o", markersize=4, capsize=2, color=colour)
            steps = [step for step in cell.runs[0].curve if all(step in run.curve for run in cell.runs)]
            means = [float(np.mean([run.curve[step] for run in cell.runs])) for step in steps]
            below.plot(
                steps, means, color=colour, zorder=3 if method == PLAIN else 2, marker="." if len(steps) < 3 else ""
            )
            below.lines[-1].set(alpha=1.0 if method == PLAIN else 0.35, linewidth=1.8 if method == PLAIN else 1.0)
        above.axvline(0.0, color=COLOURS[6], linewidth=0.8)
        above.set_yticks(range(len(methods)), methods if task == tasks[0] else [""] * len(methods), fontsize=8)
        above.set_ylim(len(methods) - 0.5, -0.5)
        above.set_title(f"{task}, {len(next(one.right for one in found if one.task == task)):,} rows", fontsize=9)
        above.set_xlabel(f"accuracy less {PLAIN}, points", fontsize=8)
        below.set_xlabel("step", fontsize=8)
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
    rows[1][0].set_ylabel(f"accuracy (black: {PLAIN})", fontsize=8)
    return figure


def main() -> None:
    argv = sys.argv[1:]
    flags = [name for name in FLAGS if f"--{name}" in argv]
    with gin_files.user_errors():
        if len(flags) != 1:
            raise ValueError(f"{' '.join(argv) or 'no flag'} given, expected one of --next, --collect, --page")
        name = sweep_of(argv)
        if flags == ["page"]:
            found = from_csv(RESULTS / f"{name}.csv")
            (RESULTS / f"{name}.md").write_text(page(name, found))
            draw(found, found[0].size).savefig(RESULTS / f"{name}.png", dpi=150)
            return
        _, trials = settings_of(argv)
        if flags == ["next"]:
            print(":".join(trial.name for trial in next_trials(trials, finished_scores(trials))))
            return
        to_csv(collect(trials), RESULTS / f"{name}.csv")


if __name__ == "__main__":
    main()

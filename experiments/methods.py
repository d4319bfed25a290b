"""Compares the methods of sweeps/methods.gin: which trials to run next, and the page of those that are finished.

    python -m experiments.methods --next --gin.DATA_DIR="'path/to/data'"
    python -m experiments.methods --collect --gin.DATA_DIR="'path/to/data'"
    python -m experiments.methods --page

`--next` prints the trials to run now, as `sweep --only=` takes them: of each method and task every learning rate with
the first seed, and once these are finished, the other seeds at the rate with the best score. `--collect` answers the
rows of the finished trials again from their best evaluation, and keeps which answers were right in
experiments/results/methods.csv. `--page` writes methods.md from that file alone.
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

from prompt_tuning_jax import gin_files
from prompt_tuning_jax.sweeps import spec

SWEEP = "sweeps/methods.gin"
RESULTS = Path(__file__).parent / "results"
FLAGS = ("next", "collect", "page")
PLAIN = "official"  # what the other methods are compared with
DRAWS = 10_000
COLUMNS = ("METHOD", "SIZE", "TASK", "LEARNING_RATE", "RANDOM_SEED", "accuracy", "best_step", "steps", "steps_to_99")
COLUMNS += ("trainable_parameters", "stored_bytes", "rows", "right", "base_fingerprint")


class Found(NamedTuple):
    """What a finished trial found.

    Attributes:
      right: which rows were answered right at the best evaluation.
      stored_bytes: of what is kept of it, `best/`.
    """

    method: str
    size: str
    task: str
    rate: str
    seed: int
    steps_to_99: int
    best_step: int
    steps: int
    trainable_parameters: int
    stored_bytes: int
    right: Bool[np.ndarray, " N"]
    base_fingerprint: str

    @property
    def accuracy(self) -> float:
        return 100.0 * float(self.right.mean())


class Interval(NamedTuple):
    """A mean, and the middle 95% of its bootstrap draws."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(values: Float[np.ndarray, "S N"], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Returns the mean over seeds and rows, with an interval over both drawn anew with replacement.

    Args:
      values: of each of S seeds on each of N rows, which are the same for all seeds.
    """
    rng = np.random.default_rng(seed)
    seeds, rows = values.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds  # [draws, S]: how often each is drawn
    of_rows = rng.multinomial(rows, np.full(rows, 1 / rows), draws) / rows
    means = np.einsum("ds,sn,dn->d", of_seeds, values, of_rows, optimize=True)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def steps_to(curve: Mapping[int, float], share: float = 0.99) -> int:
    """Returns the first evaluated step whose score is at least `share` of the best one."""
    best = max(curve.values())
    return min(step for step, score in curve.items() if score >= share * best)


def curve_of(folder: Path) -> dict[int, float]:
    """Returns a run's accuracy by step."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["accuracy"] for record in records if record["split"] == "eval"}


def next_trials(trials: Sequence[spec.Trial], scores: Mapping[str, float]) -> list[spec.Trial]:
    """Returns the trials to run now.

    Args:
      scores: of the finished trials, by name.
    """

    def cell(trial: spec.Trial) -> tuple[str, ...]:
        return tuple(value for axis, value in trial.values.items() if axis not in ("LEARNING_RATE", "RANDOM_SEED"))

    chosen = []
    for _, group in itertools.groupby(trials, key=cell):
        members = list(group)
        first = [trial for trial in members if trial.values["RANDOM_SEED"] == members[0].values["RANDOM_SEED"]]
        if all(trial.name in scores for trial in first):
            best = max(first, key=lambda trial: scores[trial.name])  # the lowest rate where several are equal
            first = [trial for trial in members if trial.values["LEARNING_RATE"] == best.values["LEARNING_RATE"]]
        chosen += [trial for trial in first if trial.name not in scores]
    return chosen


def settings_of(argv: Sequence[str]) -> tuple[spec.Sweep, list[spec.Trial]]:
    """Returns the sweep that `sweep --gin_file=sweeps/methods.gin ARGV` runs, and its trials."""
    own, texts = gin_files.split_bindings([f"--gin_file={SWEEP}", *argv], FLAGS, __doc__)
    gin_files.parse(own, FLAGS)
    settings = gin_files.configured(spec.Sweep, SWEEP)()
    gin.clear_config()
    return settings, settings.trials(texts)


def finished_scores(trials: Iterable[spec.Trial]) -> dict[str, float]:
    """Returns the best accuracy of the trials that are finished, by name."""
    return {
        trial.name: json.loads((trial.folder / "summary.json").read_text())["best"]["accuracy"]
        for trial in trials
        if (trial.folder / "summary.json").is_file()
    }


def collect(trials: Sequence[spec.Trial]) -> list[Found]:
    """Answers the rows of the finished trials again."""
    from prompt_tuning_jax.checkpoints.model import load
    from prompt_tuning_jax.checkpoints.tuned import injection_of
    from prompt_tuning_jax.sweep import checked
    from prompt_tuning_jax.training.evaluation import Evaluator, is_right

    found, models = [], {}
    for trial in trials:
        if not (trial.folder / "summary.json").is_file():
            continue
        summary = json.loads((trial.folder / "summary.json").read_text())
        config = checked(trial)
        assert config is not None
        if config.initial_checkpoint_path not in models:
            model = load(config.initial_checkpoint_path)
            models[config.initial_checkpoint_path] = model, Evaluator(model.config, model.tokenizer)
        model, evaluator = models[config.initial_checkpoint_path]
        ((_, batches),) = config.eval_dataset.eval_batches(model.tokenizer).items()
        judged = evaluator.predictions(injection_of(trial.folder, model.config), dict(model.parameters), batches)
        right = np.array([is_right(*pair) for pair in zip(judged.targets, judged.answers, strict=True)])
        said = summary["best"]["accuracy"]
        if abs(100.0 * right.mean() - said) > 1e-6:
            raise ValueError(f"{trial.name} answers {100.0 * right.mean()} right, its summary says {said}")
        values = trial.values
        found.append(
            Found(
                values["METHOD"],
                values["SIZE"],
                values["TASK"],
                values["LEARNING_RATE"],
                int(values["RANDOM_SEED"]),
                steps_to(curve_of(trial.folder)),
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


def to_csv(found: Sequence[Found], path: Path) -> None:
    """Writes a row a trial; "right" has a bit a row, the first in the highest bit, as hexadecimal digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in found:
            bits = np.packbits(one.right).tobytes().hex()
            writer.writerow(
                [one.method, one.size, one.task, one.rate, one.seed, f"{one.accuracy:.4f}", one.best_step, one.steps]
                + [one.steps_to_99, one.trainable_parameters, one.stored_bytes, len(one.right), bits]
                + [one.base_fingerprint]
            )


def from_csv(path: Path) -> list[Found]:
    """Reads what `to_csv` wrote."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8), count=int(row["rows"]))
            found.append(
                Found(
                    row["METHOD"],
                    row["SIZE"],
                    row["TASK"],
                    row["LEARNING_RATE"],
                    int(row["RANDOM_SEED"]),
                    int(row["steps_to_99"]),
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
    """A method on a task: its seeds at the chosen learning rate."""

    runs: list[Found]
    tried: int  # learning rates

    @property
    def right(self) -> Float[np.ndarray, "S N"]:
        return 100.0 * np.stack([run.right for run in self.runs]).astype(np.float64)


def cells(found: Sequence[Found]) -> dict[tuple[str, str, str], Cell]:
    """Returns the runs at the learning rate whose first seed was best, by size, task and method."""
    grouped: dict[tuple[str, str, str], list[Found]] = {}
    for one in found:
        grouped.setdefault((one.size, one.task, one.method), []).append(one)
    chosen = {}
    for key, runs in grouped.items():
        first = [run for run in runs if run.seed == min(run.seed for run in runs)]
        rate = max(first, key=lambda run: run.accuracy).rate
        chosen[key] = Cell(sorted((run for run in runs if run.rate == rate), key=lambda run: run.seed), len(first))
    return chosen


def table(found: Sequence[Found], size: str, task: str) -> str:
    """Returns a task's table in Markdown, the best method first."""
    of_task = {method: cell for (one, other, method), cell in cells(found).items() if (one, other) == (size, task)}
    plain = of_task.get(PLAIN)
    lines = [
        f"| method | learning rate | seeds | accuracy | less {PLAIN} | steps to 99% | trained | stored bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, cell in sorted(of_task.items(), key=lambda item: -item[1].right.mean()):
        difference = ""
        if plain is not None and cell is not plain and len(cell.runs) == len(plain.runs):
            over = bootstrap(cell.right - plain.right)
            difference = str(over) if over.excludes_zero else f"{over}: none"
        run = cell.runs[0]
        steps = ", ".join(str(one.steps_to_99) for one in cell.runs)
        lines.append(
            f"| {method} | {run.rate} of {cell.tried} | {len(cell.runs)} | {bootstrap(cell.right)} | {difference} "
            f"| {steps} | {run.trainable_parameters:,} | {run.stored_bytes:,} |"
        )
    return "\n".join(lines)


def page(found: Sequence[Found]) -> str:
    """Returns the page in Markdown."""
    parts = [
        "# The methods on real tasks",
        "Written by `python -m experiments.methods --page` from methods.csv. Accuracy in per cent of generated answers "
        "on training rows held back, at each run's best evaluation; mean over the seeds. In brackets: the middle 95% "
        f"of {DRAWS:,} bootstrap draws over rows and seeds. Each method had the same number of learning rates, tried "
        f'with the first seed; the best of them was run with the other seeds. "less {PLAIN}" is the difference to '
        'prompt tuning by the official recipe on the same rows; "none" stands where its interval has 0 in it. The rows '
        "that are scored also choose the learning rate and the step, so all scores are a little too high.",
    ]
    for size, task in dict.fromkeys((one.size, one.task) for one in found):
        count = next(len(one.right) for one in found if (one.size, one.task) == (size, task))
        steps = max(one.steps for one in found if (one.size, one.task) == (size, task))
        parts += [f"## {task}, {size}: {count:,} rows, {steps} steps", table(found, size, task)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    argv = sys.argv[1:]
    flags = [name for name in FLAGS if f"--{name}" in argv]
    with gin_files.user_errors():
        if len(flags) != 1:
            raise ValueError(f"{' '.join(argv) or 'no flag'} given, expected one of --next, --collect, --page")
        if flags == ["page"]:
            found = from_csv(RESULTS / "methods.csv")
            (RESULTS / "methods.md").write_text(page(found))
            return
        _, trials = settings_of(argv)
        if flags == ["next"]:
            print(":".join(trial.name for trial in next_trials(trials, finished_scores(trials))))
            return
        to_csv(collect(trials), RESULTS / "methods.csv")


if __name__ == "__main__":
    main()

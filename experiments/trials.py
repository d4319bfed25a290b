"""Reads the results of a sweep's trials from their summary.json, and stores them as a CSV with one row per trial."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning_jax.tasks.metrics import suite_score, task_score

SIZES = ("pico", "nano", "micro", "mini", "small", "base", "large", "xl", "xxl")
COLUMNS = ("command", "task", "score", "ranking_score")  # followed by one column per metric
LAST_COLUMNS = ("best_step", "steps", "seconds", "examples_seen", "base_fingerprint")
WHOLE = ("best_step", "steps", "examples_seen")
ENSEMBLE = ("average", "best", "ensemble")
RANKING = "ranking "


class Result(NamedTuple):
    """Holds a trial's result; for a training run, at its best step.

    Attributes:
      axes: the trial's value by axis of the sweep's grid, as in its folder's name.
      command: "train" or "eval".
      task: the name of the task or mixture.
      score: the mean over tasks of the mean of each task's metrics, in per cent; None if tasks only have losses. With
        several prompts, it is the score of their majority vote.
      ranking_score: the same score for predictions by ranking the labels; None if labels were not ranked.
      metrics: metrics by name: "f1"; for a mixture, "task/f1"; by ranking, "ranking f1"; for several prompts,
        "average f1", "best f1" and "ensemble f1".
      best_step, steps, examples_seen: None if nothing was trained.
      targets, answers, ranking_answers: one character per row: the right label, the generated answer (with several
        prompts, the vote) and the answer by ranking. Empty if they are not known; `experiments.answers` finds them.
    """

    axes: Mapping[str, str]
    command: str
    task: str
    score: float | None
    ranking_score: float | None
    metrics: Mapping[str, float]
    best_step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    examples_seen: int | None = None
    base_fingerprint: str = ""
    targets: str = ""
    answers: str = ""
    ranking_answers: str = ""


def read_trials(sweep_dir: Path) -> tuple[list[Result], list[str]]:
    """Returns the results of a sweep's trials, in the order of their axes, and a line for each trial without a result.

    Raises:
      ValueError: there is no such folder, or no trial in it.
    """
    if not sweep_dir.is_dir():
        raise ValueError(f"no sweep at {sweep_dir}: give the SWEEP_DIR of a sweep")
    folders = [path for path in sorted(sweep_dir.iterdir()) if path.is_dir() and axes_of(path.name)]
    if not folders:
        raise ValueError(f"no trial in {sweep_dir}, expected folders like SIZE=nano,RANDOM_SEED=0: give a SWEEP_DIR")
    results, problems = [], []
    for folder in folders:
        try:
            results.append(read_summary(axes_of(folder.name), (folder / "summary.json").read_text()))
        except FileNotFoundError:
            failed = folder / "failed.txt"
            last = failed.read_text(errors="replace").strip().rpartition("\n")[2] if failed.is_file() else ""
            problems.append(f"{folder}: {f'failed: {last}' if last else 'not finished'}")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            problems.append(f"{folder}/summary.json cannot be read: {type(error).__name__}: {error}")
    return in_order(results), problems


def axes_of(name: str) -> dict[str, str]:
    """Returns the values by axis in a trial's name, "SIZE=nano,RANDOM_SEED=0"; {} if it is not a trial's name."""
    parts = [part.partition("=") for part in name.split(",")]
    return {axis: value for axis, _, value in parts} if all(axis and value for axis, _, value in parts) else {}


def name_of(axes: Mapping[str, str]) -> str:
    """Returns the trial's name, the inverse of `axes_of`."""
    return ",".join(f"{axis}={value}" for axis, value in axes.items())


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a training run's evaluations, from metrics.jsonl: step, metrics, seconds and split."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["split"] == "eval"]


def read_summary(axes: Mapping[str, str], text: str) -> Result:
    """Returns a trial's result from its summary.json.

    Raises:
      ValueError, KeyError, TypeError, AttributeError: the text is not a summary.
    """
    summary = json.loads(text)
    if "best" in summary:
        found, command = _numbers(summary["best"]), "train"
    else:
        found, command = _evaluated(summary), "eval"
    if not found:
        raise ValueError("no metrics in it")
    return Result(
        axes=axes,
        command=command,
        task=summary["task"],
        score=_score(found, ("", "ensemble ")),
        ranking_score=_score(found, (RANKING, f"{RANKING}ensemble ")),
        metrics=found,
        **{name: summary.get(name) for name in ("best_step", "steps", "seconds", "examples_seen")},
        base_fingerprint=summary.get("base_fingerprint") or "",
    )


def _evaluated(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation by name, for one task or several, and for one prompt or several."""
    found = {}
    for task, result in summary.get("tasks", {"": summary}).items():
        for prefix, way in (("", "generation"), (RANKING, "ranking")):
            values = result.get(way, {})
            columns = {f"{column} ": values[column] for column in ENSEMBLE} if "ensemble" in values else {"": values}
            for column, metrics in columns.items():
                for name, value in _numbers(metrics).items():
                    found[f"{prefix}{column}{task}{'/' if task else ''}{name}"] = value
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}


def _score(metrics: Mapping[str, float], prefixes: Sequence[str]) -> float | None:
    scores = {}
    for prefix in prefixes:
        scores |= {task: task_score(values) for task, values in by_task(metrics, prefix).items()}
    return suite_score(scores)


def by_task(metrics: Mapping[str, float], prefix: str = "") -> dict[str, dict[str, float]]:
    """Returns the metrics that have exactly this prefix, by task; a task that is not in a mixture has the name "".

    Tasks that have a loss instead of metrics are left out.
    """
    tasks: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith(prefix) and " " not in name[len(prefix) :]:
            task, _, metric = name[len(prefix) :].rpartition("/")
            tasks.setdefault(task, {})[metric] = value
    return {task: values for task, values in tasks.items() if "loss" not in values}


def split_mixtures(results: Sequence[Result], axis: str = "TASK") -> list[Result]:
    """Splits the result of each mixture's trial that lacks the axis into one result per task; returns all results.

    Each new result gets the value that trials of the same task have on the axis, even if their inputs have other
    wordings. A task without such trials is left out; if no trial has the axis, tasks keep their own names.
    """
    known = {_plain(result.task): result.axes[axis] for result in results if axis in result.axes}
    split = []
    for result in results:
        tasks = {} if axis in result.axes else by_task(result.metrics)
        if "" in tasks or not tasks:
            split.append(result)
            continue
        for task, metrics in tasks.items():
            if not known or _plain(task) in known:
                axes = {**result.axes, axis: known.get(_plain(task), task)}
                split.append(result._replace(axes=axes, task=task, score=task_score(metrics), metrics=metrics))
    return split


def _plain(task: str) -> str:
    """Returns a task's name without prefixes and suffixes. (WSC is a mixture, which is evaluated on `_simple_eval`.)"""
    return re.sub(
        r"^((ladder|sentinel|mt5|byt5|taskless|task_index)_)+|_examples\b|_and_dev(?=_)|(?<=_simple)_eval", "", task
    )


def by_ranking(result: Result) -> Result:
    """Returns the result with its score and answers by ranking; unchanged if it has no such score."""
    if result.ranking_score is None:
        return result
    return result._replace(score=result.ranking_score, answers=result.ranking_answers)


def by_setting(results: Sequence[Result], axis: str) -> dict[str, dict[str, dict[str, list[Result]]]]:
    """Returns the trials that have a score, by size, value of `axis` and task, smallest size first."""
    found: dict[str, dict[str, dict[str, list[Result]]]] = {}
    for result in sorted(results, key=lambda result: SIZES.index(result.axes["SIZE"])):
        if "TASK" in result.axes and result.score is not None:
            of_size = found.setdefault(result.axes["SIZE"], {})
            of_size.setdefault(result.axes[axis], {}).setdefault(result.axes["TASK"], []).append(result)
    return found


def axes_in(results: Iterable[Result]) -> list[str]:
    """Returns all axes of the results, starting with those of the trials that have the most axes."""
    most_first = sorted(results, key=lambda result: -len(result.axes))
    return list(dict.fromkeys(axis for result in most_first for axis in result.axes))


def value_order(value: str | None) -> tuple[int, float, str]:
    """Returns a key that sorts an axis's values: first None, then sizes by size, then numbers, then names."""
    if value is None:
        return (0, 0.0, "")
    if value in SIZES:
        return (1, float(SIZES.index(value)), "")
    try:
        return (2, float(value), value)
    except ValueError:
        return (3, 0.0, value)


def in_order(results: Sequence[Result]) -> list[Result]:
    """Sorts the results by their axes, the first axis first."""
    axes = axes_in(results)
    return sorted(results, key=lambda result: [value_order(result.axes.get(axis)) for axis in axes])


def to_csv(results: Sequence[Result]) -> str:
    """Returns a CSV with one row per trial: a column per axis, `COLUMNS`, a column per metric, and `LAST_COLUMNS`."""
    axes = axes_in(results)
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*axes, *COLUMNS, *metrics, *LAST_COLUMNS])
    for result in results:
        fields = result._asdict()
        row = [result.axes.get(axis) for axis in axes]
        row += [fields[name] for name in COLUMNS]
        row += [result.metrics.get(name) for name in metrics]
        row += [fields[name] for name in LAST_COLUMNS]
        writer.writerow(row)
    return text.getvalue()


def from_csv(text: str) -> list[Result]:
    """Reads a CSV that `to_csv` wrote.

    Raises:
      ValueError: the text is not such a CSV.
    """
    header, *rows = csv.reader(io.StringIO(text), strict=True) if text.strip() else [[]]
    first, last = len(header) - len(LAST_COLUMNS), tuple(header[-len(LAST_COLUMNS) :])
    start = header.index("command") if "command" in header else first
    end = start + len(COLUMNS)
    if tuple(header[start:end]) != COLUMNS or last != LAST_COLUMNS:
        raise ValueError(f"no CSV of trials: expected the columns {', '.join(COLUMNS + LAST_COLUMNS)}")
    return [_from_row(header, row, start, end, first) for row in rows]


def _from_row(header: Sequence[str], row: Sequence[str], start: int, end: int, last: int) -> Result:
    cells = dict(zip(header, row, strict=True))
    named = (*header[end:last], "score", "ranking_score", "seconds")
    numbers = {name: float(cells[name]) for name in named if cells[name]}
    return Result(
        axes={axis: cells[axis] for axis in header[:start] if cells[axis]},
        command=cells["command"],
        task=cells["task"],
        score=numbers.get("score"),
        ranking_score=numbers.get("ranking_score"),
        metrics={name: numbers[name] for name in header[end:last] if name in numbers},
        seconds=numbers.get("seconds"),
        base_fingerprint=cells["base_fingerprint"],
        **{name: int(cells[name]) if cells[name] else None for name in WHOLE},
    )

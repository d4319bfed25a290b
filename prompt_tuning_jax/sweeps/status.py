"""Reads the state of each trial of a sweep from its folder, and formats it as a table, without importing JAX."""

import collections
import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prompt_tuning_jax.batches.lock import RUNNING, owner
from prompt_tuning_jax.sweeps.spec import Trial
from prompt_tuning_jax.tasks.metrics import record_score

SUMMARY = "summary.json"
FAILED = "failed.txt"

STATES = ("running", "failed", "stopped", "waiting", "finished")  # if lines are few, the table keeps the first
NARROWEST_NAME = 12  # how many characters of a trial's name a narrow table keeps


class TrialState(NamedTuple):
    """Holds the state of a trial.

    Attributes:
      state: "finished"; "running"; "failed"; "stopped", which means that the trial has begun and will resume when it is
        started again; or "waiting".
      step: the step of the newest record; None before the first.
      steps: TRAIN_STEPS.
      score: the score of the best evaluation so far, by the measure with which the run chooses its best step: in per
        cent, or a negated loss.
      seconds_left: the estimated remaining time of a running trial, at its speed so far.
      last_line: the last line of a failed trial's failed.txt.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    score: float | None = None
    seconds_left: float | None = None
    last_line: str = ""


def trial_state(trial: Trial, steps: int | None = None) -> TrialState:
    """Reads the state of a trial from its folder, which may be missing.

    Args:
      steps: TRAIN_STEPS of the trial; None to take it from the trial's arguments, or from the run's config.gin.

    Raises:
      OSError: the folder exists but cannot be read.
    """
    folder = trial.folder
    records = list(_records(folder / "metrics.jsonl"))
    step = records[-1]["step"] if records else None
    best = max((record_score(record) for record in records if record["split"] == "eval"), default=None)
    now = TrialState(trial.name, "waiting", step, steps or trial.train_steps or _train_steps(folder), best)
    if is_finished(trial, now.steps):
        return now._replace(state="finished", score=_summary(folder).get("score", now.score))
    if (lines := _text(folder / FAILED)) is not None:
        return now._replace(state="failed", last_line=lines.strip().splitlines()[-1] if lines.strip() else "")
    if owner(folder / RUNNING) is not None:
        return now._replace(state="running", seconds_left=_seconds_left(records, now.steps))
    begun = folder.is_dir() and any(path.name != RUNNING for path in folder.iterdir())
    return now._replace(state="stopped" if begun else "waiting")


def is_finished(trial: Trial, steps: int | None = None) -> bool:
    """Returns whether a trial has a summary, and not one of fewer steps, unless the run was stopped early.

    Args:
      steps: TRAIN_STEPS of the trial; None to take it from the trial's arguments.
    """
    if not (trial.folder / SUMMARY).exists():
        return False
    summary = _summary(trial.folder)
    done, steps = summary.get("steps"), steps or trial.train_steps or 0
    return bool(summary.get("stopped_early")) or not isinstance(done, int) or done >= steps


def table(states: Sequence[TrialState], width: int | None = None, height: int | None = None) -> str:
    """Returns a table with one row per trial, the last line of each failed trial below its row, and a line of counts.

    Args:
      width: the largest number of characters per line; None for the terminal's width, or no limit without a terminal.
      height: the largest number of lines; if there are too many, waiting and finished trials are left out first.
    """
    width = width or shutil.get_terminal_size((0, 0)).columns or None
    shown = states if height is None else _fitting(states, height - 3)
    cells = [(state.name, state.state, _steps(state), _score(state), _time_left(state)) for state in shown]
    rows = [("trial", "state", "step", "score", "left"), *cells]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    if width:
        others = sum(widths[1:]) + 2 * 4
        widths[0] = min(widths[0], max(width - others, NARROWEST_NAME))
    lines = []
    for number, (name, state, *numbers) in enumerate(rows):
        right = "  ".join(f"{text:>{wide}}" for text, wide in zip(numbers, widths[2:], strict=True))
        lines.append(f"{_truncate_middle(name, widths[0]):{widths[0]}}  {state:{widths[1]}}  {right}")
        if number and (last_line := shown[number - 1].last_line):
            lines.append(f"    {last_line}")
    if len(shown) < len(states):
        lines.append(f"... and {len(states) - len(shown)} more")
    lines.append(counts(states))
    return "\n".join(_printable(line)[:width].rstrip() for line in lines)


def counts(states: Sequence[TrialState]) -> str:
    """Returns a line with the number of trials per state."""
    found = collections.Counter(state.state for state in states)
    parts = [f"{found[state]} {state}" for state in ("finished", *STATES[:-1]) if found[state]]
    return f"{len(states)} trial{'' if len(states) == 1 else 's'}: {', '.join(parts) or 'none'}"


def describe(state: TrialState) -> str:
    """Returns a line that describes one trial."""
    where = f" at step {_steps(state)}" if state.step is not None else ""
    score = f", score {_score(state)}" if state.score is not None else ""
    last_line = f": {state.last_line}" if state.last_line else ""
    return _printable(f"{state.name}: {state.state}{where}{score}{last_line}")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in (_text(path) or "").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            return  # this is the last line, which the run is just writing
        if not isinstance(record, dict) or not {"step", "split", "seconds"} <= {*record}:
            return  # a damaged record, which the run refuses or rewrites when it resumes
        yield record


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _train_steps(folder: Path) -> int | None:
    found = re.search(r"(?m)^TRAIN_STEPS = (\d+)$", _text(folder / "config.gin") or "")
    return int(found[1]) if found else None


def _summary(folder: Path) -> dict[str, Any]:
    """Returns the content of summary.json: an evaluation's has a score, a training run's has its steps."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(_text(folder / SUMMARY) or ""), dict):
            return found
    return {}


def _seconds_left(records: Sequence[Mapping[str, Any]], steps: int | None) -> float | None:
    if not records or steps is None:
        return None
    first, last = records[0], records[-1]
    taken, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    if not taken:  # there is only one record; its time includes starting the run
        taken, seconds = last["step"], last["seconds"]
    return max(steps - last["step"], 0) * seconds / taken if taken else None


def _fitting(states: Sequence[TrialState], lines: int) -> list[TrialState]:
    fitting = set()
    for state in sorted(states, key=lambda state: STATES.index(state.state)):
        lines -= 2 if state.last_line else 1
        if lines < 0:
            break
        fitting.add(state.name)
    return [state for state in states if state.name in fitting]


def _steps(state: TrialState) -> str:
    if state.step is None and state.steps is None:
        return ""
    return f"{state.step or 0}" + (f"/{state.steps}" if state.steps is not None else "")


def _score(state: TrialState) -> str:
    return "" if state.score is None else f"{state.score:.2f}"


def _time_left(state: TrialState) -> str:
    if state.seconds_left is None:
        return ""
    minutes, seconds = divmod(round(state.seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


def _truncate_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 3) // 2
    return f"{text[: width - 3 - end]}...{text[len(text) - end :]}"


def _printable(line: str) -> str:
    """Replaces characters that could move a terminal's cursor by spaces."""
    return "".join(character if character.isprintable() else " " for character in line)

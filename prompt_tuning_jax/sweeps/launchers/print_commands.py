"""Prints the command lines of a sweep's jobs, for a shell or for any other program that runs them."""

import dataclasses
import shlex
from collections.abc import Sequence

from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.spec import Trial


@dataclasses.dataclass(frozen=True)
class Print:
    """Prints one line per job, and a comment before each job that has several trials."""

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        for job in jobs:
            if len(job.trials) > 1:
                axes = ", ".join(differing_axes(job.trials))
                print(f"# {job.name}: {len(job.trials)} trials in one program, of different {axes}")
            print(shell_line(job.command_line))
        return 0


def shell_line(command_line: Sequence[str]) -> str:
    """Returns one line of bash that runs exactly these arguments."""
    return " ".join(map(_quoted, command_line))


def differing_axes(trials: Sequence[Trial]) -> list[str]:
    """Returns the axes on which these trials have different values, in the order of the grid."""
    axes = dict.fromkeys(axis for trial in trials for axis in trial.values)
    return [axis for axis in axes if len({trial.values.get(axis) for trial in trials}) > 1]


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    # shlex.quote would keep a line break as it is; bash's $'...' keeps the command on one line.
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in escaped) + "'"

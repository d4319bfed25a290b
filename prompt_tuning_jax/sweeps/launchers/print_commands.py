"""Prints the command lines of a sweep's jobs, for a shell or for whatever else runs them."""

import dataclasses
import shlex
from collections.abc import Sequence

from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.spec import Trial


@dataclasses.dataclass(frozen=True)
class Print:
    """One line a job, and before a job of several trials a comment on them."""

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        for job in jobs:
            if len(job.trials) > 1:
                axes = ", ".join(differing_axes(job.trials))
                print(f"# {job.name}: {len(job.trials)} trials in one program, of different {axes}")
            print(shell_line(job.command_line))
        return 0


def shell_line(command_line: Sequence[str]) -> str:
    """One line of bash that runs exactly these arguments."""
    return " ".join(map(_quoted, command_line))


def differing_axes(trials: Sequence[Trial]) -> list[str]:
    """The axes that these trials do not have one value of, in the order of the grid."""
    axes = dict.fromkeys(axis for trial in trials for axis in trial.values)
    return [axis for axis in axes if len({trial.values.get(axis) for trial in trials}) > 1]


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    # shlex would put a line break as it is; $'...' of bash keeps one line.
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in escaped) + "'"

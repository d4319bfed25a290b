"""Defines a job, which is one process that runs one trial or several, and the interface of launchers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from prompt_tuning_jax.sweeps.spec import Trial


class Job(NamedTuple):
    """A process that a launcher starts with one command line.

    Attributes:
      name: "000", "001", ...; the job's log is `SWEEP_DIR/logs/<name>.log`.
      trials: the trials that the job runs; more than one if they share a compiled program.
      command_line: the program and its arguments. It starts with "python", which a launcher replaces by the path of
        its interpreter.
    """

    name: str
    trials: tuple[Trial, ...]
    command_line: Sequence[str]


class Launcher(Protocol):
    """Starts jobs, for example on this machine or on a cluster. gin sets the fields of each launcher."""

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Starts the jobs, waits for them if the launcher can, and returns the exit code of `sweep`.

        Raises:
          ValueError: the launcher's program or library is not installed (the message says what to install), or a field
            is missing.
        """
        ...

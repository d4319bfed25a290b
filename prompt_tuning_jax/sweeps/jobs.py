"""A job: what a launcher starts as one process, with one command line, for one trial or for several together."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from prompt_tuning_jax.sweeps.spec import Trial


class Job(NamedTuple):
    """One process.

    Attributes:
      name: of its log, `SWEEP_DIR/logs/<name>.log`: "000", "001", ...
      trials: what it runs; several where they share a program.
      command_line: "python" first, which a launcher replaces by the interpreter it means.
    """

    name: str
    trials: tuple[Trial, ...]
    command_line: Sequence[str]


class Launcher(Protocol):
    """Starts jobs somewhere. gin sets a launcher's own fields."""

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Starts the jobs, and waits for them where it can; returns the exit code of `sweep`.

        Raises:
          ValueError: the launcher's program or library is not there (what to install), or a field is missing.
        """
        ...

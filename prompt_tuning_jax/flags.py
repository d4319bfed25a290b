"""What the command lines share that read flags and no gin: how a setting is called, and errors in one line."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from prompt_tuning_jax.command_line import one_line_errors
from prompt_tuning_jax.errors import spelled, spelling

# The flags that are not called by their setting's canonical name.
FLAGS = {
    "initial_checkpoint_path": "--base",
    "prompt_file": "--prompts",
    "class_labels": "--labels",
    "base_dtype": "--dtype",
}


def as_flag(name: str) -> str:
    """Returns the flag of a setting, by its canonical name."""
    return FLAGS.get(name, f"--{name}")


@contextlib.contextmanager
def flag_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a user's error into one line and exit code 2; and whoever reads stdout may stop reading.

    Args:
      names: how this command line calls a setting, where that is not `as_flag`'s.
    """

    def spell(name: str) -> str:
        return (names or {}).get(name) or as_flag(name)

    with one_line_errors(lambda error: spelled(error, spell)), spelling(spell):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

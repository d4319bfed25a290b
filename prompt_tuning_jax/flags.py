"""Reports errors in one line that names settings by their flags, for the command lines without gin files."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from prompt_tuning_jax.command_line import one_line_errors
from prompt_tuning_jax.errors import error_text, spelling

# The flags whose names differ from the canonical name of their setting.
FLAGS = {
    "initial_checkpoint_path": "--base",
    "prompt_file": "--prompts",
    "class_labels": "--labels",
    "base_dtype": "--dtype",
}


def as_flag(name: str) -> str:
    """Returns the flag for the setting with this canonical name."""
    return FLAGS.get(name, f"--{name}")


@contextlib.contextmanager
def flag_errors(names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a user's error into one line and exit code 2. It is no error if the reader of stdout stops reading.

    Args:
      names: this command line's flags that differ from those of `as_flag`, by the setting's canonical name.
    """

    def spell(name: str) -> str:
        return (names or {}).get(name) or as_flag(name)

    with one_line_errors(lambda error: error_text(error, spell)), spelling(spell):
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

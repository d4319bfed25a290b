"""Parses flags and reports a user's error as every command line does: one line on stderr, and exit code 2."""

import argparse
import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from prompt_tuning_jax.settings import annotations_of, check, number_in

TERMINATED = 143  # exit code after SIGTERM: the run was saved, and can be started again


@contextlib.contextmanager
def one_line_errors(text: Callable[[Exception], str]) -> Iterator[None]:
    """Turns a ValueError or OSError into one line on stderr and exit code 2.

    Args:
      text: returns an error's message with settings as this command line spells them.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(text(error).split())}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; numbers are checked as all settings are (`settings`)."""

    def __init__(self, module: str, description: str | None):
        super().__init__(
            f"python -m {module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self._numbers: dict[str, Any] = {}

    def add_number(self, name: str, annotation: Any, default: Any, about: str) -> None:
        """Adds the flag of a number.

        Args:
          name: its canonical name, which is the flag's.
          annotation: what it must be, as `settings.check` takes it.
          about: what `--help` says.
        """
        self._numbers[name] = annotation
        self.add_argument(f"--{name}", type=_number_or_text, metavar="NUMBER", default=default, help=about)

    def add_numbers(self, declared: Callable[..., Any], **about: str) -> None:
        """Adds flags of numbers that a dataclass or function declares with kind and default.

        Args:
          about: by name, what `--help` says.
        """
        for name, text in about.items():
            default = inspect.signature(declared).parameters[name].default
            self.add_number(name, annotations_of(declared)[name], default, text)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for name, annotation in self._numbers.items():
            check(name, getattr(found, name), annotation)
        return found

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what there is")


def _number_or_text(text: str) -> Any:
    """Returns a number; a text that is none stays one, for a check to refuse."""
    number = number_in(text)
    return text if number is None else number

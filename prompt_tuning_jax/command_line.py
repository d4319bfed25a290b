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
    """Parses arguments, and raises ValueError with one line if one is invalid; `settings.check` checks numbers."""

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
          name: the setting's canonical name, which is also the flag's.
          annotation: the kind of number, as `settings.check` takes it.
          about: the text that `--help` shows.
        """
        self._numbers[name] = annotation
        self.add_argument(f"--{name}", type=_number_or_text, metavar="NUMBER", default=default, help=about)

    def add_numbers(self, declared: Callable[..., Any], **about: str) -> None:
        """Adds a flag for each of these numbers, with the annotation and the default of a dataclass or function.

        Args:
          about: the text that `--help` shows, by name.
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
    """Returns the number in a text, or the text itself if it is not a number: `check` then refuses it."""
    number = number_in(text)
    return text if number is None else number

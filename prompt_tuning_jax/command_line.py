"""What every command line does with a user's error: it prints one line on stderr, and exits with code 2."""

import contextlib
import sys
from collections.abc import Callable, Iterator

TERMINATED = 143  # exit code of a run that SIGTERM ended: it is saved, to be started again


@contextlib.contextmanager
def one_line_errors(text: Callable[[Exception], str]) -> Iterator[None]:
    """Turns a ValueError or OSError into one line on stderr and exit code 2.

    Args:
      text: returns an error's message, with settings written as this command line calls them.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(text(error).split())}", file=sys.stderr)
        sys.exit(2)

"""Reports a user's error as every command line does: one line on stderr, and exit code 2."""

import contextlib
import sys
from collections.abc import Callable, Iterator

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

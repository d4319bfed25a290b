"""Errors as T5X's users read them: T5X prints an exception as it is, and its settings are gin's macros."""

import contextlib
from collections.abc import Iterator

from prompt_tuning_jax.errors import SettingError


@contextlib.contextmanager
def named_by_macros() -> Iterator[None]:
    """Names settings by their macros in the errors that leave this context."""
    try:
        yield
    except SettingError as error:
        raise ValueError(error.text(str.upper)) from None

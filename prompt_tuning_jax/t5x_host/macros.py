"""Writes errors for users of T5X: T5X prints an exception unchanged, and its settings are gin macros."""

import contextlib
from collections.abc import Iterator

from prompt_tuning_jax.errors import SettingError


@contextlib.contextmanager
def named_by_macros() -> Iterator[None]:
    """Turns a SettingError in this context into a ValueError that names settings by their macros."""
    try:
        yield
    except SettingError as error:
        raise ValueError(error.text(str.upper)) from None

"""Checks of a method's fields that several methods share."""

from typing import Any

from prompt_tuning_jax.errors import Setting, SettingError


def check_whole_number(setting: str, value: Any, most: int | None = None, which: str = "") -> None:
    """Raises SettingError if a field is not a whole number from 1 to `most`.

    Args:
      setting: the field's canonical name.
      most: the largest value; None if there is none.
      which: says what `most` is, "the width of the model", for the message.

    >>> check_whole_number("rank", 9, 8, "the width of the model")
    Traceback (most recent call last):
    prompt_tuning_jax.errors.SettingError: `rank` is 9, expected a whole number from 1 to 8, the width of the model
    """
    if type(value) is int and value >= 1 and (most is None or value <= most):
        return
    expected = "of at least 1" if most is None else f"from 1 to {most}"
    ending = f", {which}" if which else ""
    raise SettingError(Setting(setting), f" is {value!r:.60}, expected a whole number {expected}{ending}")


def check_seed(setting: str, value: Any) -> None:
    """Raises SettingError if a field is not a seed that NumPy takes: a whole number from 0 to 2^32 - 1."""
    if type(value) is not int or not 0 <= value < 2**32:
        raise SettingError(Setting(setting), f" is {value!r:.60}, expected a whole number from 0 to {2**32 - 1}")

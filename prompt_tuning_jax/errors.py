"""Defines errors about a setting, which say what was found, what was expected, and which setting to change.

Library code refers to a setting by its canonical name, T5X's macro in lower case: `Setting("prompt_file")`. Each front
end writes that name in its own way: Python as the argument's name, gin as the macro, a command line as the flag.

    >>> error = SettingError(Setting("batch_size"), " is 0, expected at least 1")
    >>> str(error), error.setting
    ('`batch_size` is 0, expected at least 1', 'batch_size')
    >>> error.text(str.upper)
    'BATCH_SIZE is 0, expected at least 1'
"""

import contextlib
import contextvars
import difflib
import errno
from collections.abc import Callable, Iterable, Iterator

# The numbers of the errors of a full disk. NumPy's error for a short write has none.
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None))
# The names of Python arguments that differ from the canonical name of their setting.
ARGUMENTS = {
    "initial_checkpoint_path": "where",
    "prompt_file": "prompt",
    "train_steps": "steps",
    "eval_period": "eval_every",
    "random_seed": "seed",
    "model_dir": "folder",
    "task_feature_lengths": "lengths",
    "prompt_length": "length",
    "prompt_folder": "folder",
    "prompt_like": "like",
    "class_labels": "labels",
    "mixture_or_task_name": "name",
    "mixture_or_task_module": "module",
    "task_files": "mapping",
    "inputs_column": "inputs",
    "targets_column": "targets",
    "train_split": "train",
    "eval_split": "validation",
    "base_dtype": "dtype",
    "prompt_init": "init",
    "log_period": "log_every",
    "activation_dtype": "dtype",
}
LONGEST = 2_000  # characters of a message: a tensor's name may be as long as its file


class Setting(str):
    """A part of an error's message that is the canonical name of a setting."""


class Private(str):
    """A part of a message that only the machine's own user may see: a path, or a file's content."""


class SettingError(ValueError):
    """Says that a setting, or what it refers to, is invalid.

    Attributes:
      parts: the parts of the message; each front end writes those that are a `Setting` in its own way.
      setting: the canonical name of the first setting that the message names; None if it names none.
    """

    def __init__(self, *parts: str):
        self.parts = parts
        self.setting = next((str(part) for part in parts if isinstance(part, Setting)), None)
        super().__init__(self.text(in_python))

    def text(self, spell: Callable[[str], str]) -> str:
        """Returns the message, one line, with each setting's name as `spell(canonical name)` writes it."""
        text = "".join(spell(str(part)) if isinstance(part, Setting) else part for part in self.parts)
        text = " ".join(text.splitlines())
        half = LONGEST // 2 - 3
        return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"

    @property
    def public(self) -> "SettingError":
        """The same error without the parts that are `Private`."""
        return SettingError(*(part for part in self.parts if not isinstance(part, Private)))

    def __reduce__(self):
        return type(self), self.parts


def in_python(name: str) -> str:
    """Returns a setting as the name of a Python argument."""
    return f"`{ARGUMENTS.get(name, name)}`"


_spelling: contextvars.ContextVar[Callable[[str], str]] = contextvars.ContextVar("spelling", default=in_python)


@contextlib.contextmanager
def spelling(spell: Callable[[str], str]) -> Iterator[None]:
    """Makes `message_text` write settings as `spell(canonical name)` in this context, as a command line spells them."""
    token = _spelling.set(spell)
    try:
        yield
    finally:
        _spelling.reset(token)


def message_text(*parts: str) -> str:
    """Returns a message that is not an error, with each `Setting` as the current front end spells it.

    >>> said("rows are truncated: raise ", Setting("batch_size"))
    'rows are truncated: raise `batch_size`'
    """
    return SettingError(*parts).text(_spelling.get())


def error_text(error: Exception, spell: Callable[[str], str]) -> str:
    """Returns the message of any error, with each setting's name as `spell(canonical name)` writes it."""
    return error.text(spell) if isinstance(error, SettingError) else str(error)


def prefixed(prefix: str, error: ValueError) -> ValueError:
    """Returns `error` with `prefix` in front of its message; a SettingError keeps its settings."""
    return SettingError(prefix, *error.parts) if isinstance(error, SettingError) else ValueError(f"{prefix}{error}")


@contextlib.contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Gives settings other canonical names in the errors that leave this context.

    Args:
      names: new canonical names, by the old ones.

    >>> with renamed(prompt_file="source"):
    ...     raise SettingError("no prompt file x: set ", Setting("prompt_file"))
    Traceback (most recent call last):
    prompt_tuning_jax.errors.SettingError: no prompt file x: set `source`
    """
    try:
        yield
    except SettingError as error:
        parts = (Setting(names.get(part, part)) if isinstance(part, Setting) else part for part in error.parts)
        raise SettingError(*parts) from None


def near_misses(
    name: str,
    known: Iterable[str],
    few: int = 8,
    *,
    shown: Callable[[str], str] = str,
    otherwise: str | None = None,
) -> str:
    """Returns the end of a message about an unknown name: the known names that are similar, or else a list of them.

    Args:
      few: the largest number of names in the list.
      shown: how a name is written; `repr` to quote it.
      otherwise: what to return if no name is similar; None for the list.

    >>> near_misses("sts2", ["sst2", "rte"]), near_misses("x", ["sst2", "rte"])
    ('did you mean sst2?', 'there are rte, sst2')
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=6)
    # Names with the same letters come first, because swapped letters are the most frequent slip.
    near.sort(key=lambda other: sorted(other) != sorted(name))
    if near:
        return f"did you mean {' or '.join(map(shown, near[:3]))}?"
    if otherwise is not None:
        return otherwise
    return (
        f"there are {', '.join(map(shown, names[:few]))}{', ...' * (len(names) > few)}" if names else "there are none"
    )

"""Fills a prompt bank from a folder of prompts, and updates the bank when the folder changes.

Each entry of the folder is one prompt, which has the name of the entry:

    sst2.npy        a prompt; if sst2.json, the summary.json of its run, is beside it, the base model is checked
    rte/            a run (best/prompt.npy, summary.json), a prompt with additions per layer (prompt.npy and
                    layer_prompts.npy), a PEFT adapter, a folder with the official file, or a T5X checkpoint with a
                    prompt in it

The path of a single prompt counts as a folder of one prompt. The folder of a run that trained one prompt per task
counts as the folder of these prompts.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.array_files.t5x import is_t5x
from prompt_tuning_jax.checkpoints.trained_on import TrainedOn, read_trained_on, summary_of
from prompt_tuning_jax.checkpoints.tuned import LAYER_PROMPTS, folder_of_additions, read_prompts
from prompt_tuning_jax.errors import Private, Setting, SettingError
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.prompts import peft
from prompt_tuning_jax.prompts.files import OFFICIAL_NAME, PROMPT, RUN_PROMPT, RUN_PROMPTS
from prompt_tuning_jax.regular_files import is_irregular


class Entry(NamedTuple):
    """Holds the paths of a prompt on disk.

    Attributes:
      prompt: the path for `read_prompts`.
      summary: the path of its run's summary.json, which may not exist.
      state: the files' sizes, modification times and inodes; it changes when a file changes.
      paths: the entries of the folder that have the prompt's name; several if a file and a folder share the name.
    """

    prompt: Path
    summary: Path
    state: tuple
    paths: tuple[Path, ...] = ()


class Changes(NamedTuple):
    """Holds the names of the prompts that `sync` added and removed, and the error of each prompt that is now broken."""

    added: list[str]
    removed: list[str]
    broken: dict[str, Exception]


class PromptFolder:
    """Copies the prompts of a folder into a bank, and reports what has changed.

    Attributes:
      broken: by name, the error of each prompt that could not be read or added at the last `sync`.
      public_errors: the same errors as clients see them: without paths and without file contents.
      remarks: by name, the remark about a prompt that was read, if there is one; see `TrainedOn.remark`.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads no prompt yet.

        Raises:
          ValueError: `path` does not exist.
        """
        self.path = Path(path)
        if (self.path / RUN_PROMPTS).is_dir():
            self.path = self.path / RUN_PROMPTS
        if not self.path.exists():
            raise SettingError(
                f"no folder of prompts at {path}: set ", Setting("prompts"), " to a folder of them, or to one prompt"
            )
        self._read_states: dict[str, tuple] = {}  # the state of each prompt that was read
        self._last_states: dict[str, tuple] = {}  # the state of each prompt at the last `sync`
        self.broken: dict[str, Exception] = {}
        self.public_errors: dict[str, Exception] = {}
        self.remarks: dict[str, str] = {}

    @property
    def single(self) -> str | None:
        """The prompt's name if `path` is a single prompt; None if it is a folder of prompts."""
        return _name(self.path) if _entry(self.path) else None

    def entries(self) -> dict[str, Entry]:
        """Returns the prompts in the folder by name; the names are sorted."""
        try:
            paths = [self.path] if self.single else sorted(self.path.iterdir())
        except OSError as error:
            what, where = "cannot read the folder of prompts", Private(f" {self.path}")
            raise SettingError(what, where, f" ({error.strerror})") from None
        found: dict[str, Entry] = {}
        for path in paths:
            entry = None if path.name.startswith(".") else _entry(path)
            if entry is not None:
                other = found.get(name := _name(path))
                states = (entry.state,) if other is None else (*other.state, entry.state)
                found[name] = entry._replace(state=states, paths=(*(other.paths if other else ()), path))
        return found

    def sync(self, bank: PromptBank, *, settled: bool = False) -> Changes:
        """Updates the bank from the folder: adds new and changed prompts, removes deleted ones.

        A broken prompt is not added, and if an earlier version of it is in the bank, that version stays. A prompt whose
        files change while they are read is read again at the next call.

        Args:
          settled: whether a prompt is read only if its files have not changed since the last call, so that files which
            are still being written are not read.
        """
        entries = self.entries()
        previous, self._last_states = self._last_states, {name: entry.state for name, entry in entries.items()}
        removed = [name for name in self._read_states if name not in entries]
        for name in removed:
            del self._read_states[name]
            self.broken.pop(name, None)
            self.public_errors.pop(name, None)
            self.remarks.pop(name, None)
            if name in bank:
                bank.remove(name)
        added = []
        for name, entry in entries.items():
            if self._read_states.get(name) == entry.state or (settled and previous.get(name) != entry.state):
                continue
            error, public_error = self._read_into(bank, name, entry)
            if not _is_unchanged(entry):
                if not settled:
                    self.broken[name] = self.public_errors[name] = ValueError(
                        f"prompt {name} changed while it was read"
                    )
                continue
            self._read_states[name] = entry.state
            if error is None:
                self.broken.pop(name, None)
                self.public_errors.pop(name, None)
                added.append(name)
            else:
                self.broken[name], self.public_errors[name] = error, public_error or error
        bank.broken = dict(self.public_errors)
        return Changes(added, removed, dict(self.broken))

    def _read_into(self, bank: PromptBank, name: str, entry: Entry) -> tuple[Exception | None, Exception | None]:
        """Reads a prompt into the bank.

        Returns:
          The error, or None; and the error as clients see it, or None if both are the same.
        """
        try:
            read = read_entry(entry)
        except Exception as error:  # of any type: whatever a file contains, the other prompts are served
            return _without_frames(error), _without_private_parts(error)
        if _is_unchanged(entry):
            prompt, source, additions = read
            try:
                bank.add(name, prompt, source.base, additions, tokenizer=source.tokenizer)
            except ValueError as error:
                return _without_frames(error), None
            self.remarks.pop(name, None)
            if remark := source.remark(f"prompt {name}", bank.base):
                self.remarks[name] = remark
        return None, None


def _is_unchanged(entry: Entry) -> bool:
    found = [_entry(path) for path in entry.paths]
    return [None if now is None else now.state for now in found] == list(entry.state)


def _without_frames(error: Exception) -> Exception:
    """Returns the error without its traceback, whose frames would keep the arrays that were read."""
    error.__context__ = None
    return error.with_traceback(None)


def _without_private_parts(error: Exception) -> ValueError:
    """Returns the error for clients, which contains no path and no file content."""
    if isinstance(error, SettingError) and any(isinstance(part, Private) for part in error.parts):
        return error.public
    return ValueError("its files cannot be read as a prompt; the service's own log says why")


def read_entry(
    entry: Entry,
) -> tuple[Float[np.ndarray, "*L P D"], TrainedOn, Float[np.ndarray, "L P D"] | None]:
    """Returns the prompt, what its files say of its training, and its additions per layer or None.

    Raises:
      ValueError: the prompt or its summary cannot be read, or two entries have the same name.
    """
    if len(entry.paths) > 1:
        both = " and ".join(path.name for path in entry.paths)
        raise SettingError(f"{both} are prompts of one name", Private(f" in {entry.paths[0].parent}"), ": rename one")
    _check_files(entry)
    source, found = read_trained_on(entry.prompt, entry.summary), read_prompts(entry.prompt)
    per_layer = None if found.layer_prompts is None else np.asarray(found.layer_prompts)
    if found.prompt is not None:
        return np.asarray(found.prompt), source, per_layer
    assert per_layer is not None
    return per_layer, source, None


def _check_files(entry: Entry) -> None:
    """Raises ValueError if a path is not a regular file: opening a named pipe would block until it is written to."""
    inside = entry.prompt.rglob("*") if entry.prompt.is_dir() else (entry.prompt,)
    for path in (*inside, entry.summary):
        if is_irregular(path):
            raise SettingError(Private(f"{path.parent}/"), f"{path.name} is no regular file")


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _entry(path: Path) -> Entry | None:
    """Returns the prompt at `path`; None if there is no prompt."""
    if path.is_dir():
        summary = summary_of(path)
        if (path / RUN_PROMPT).is_file():
            files = [path / RUN_PROMPT, path / RUN_PROMPT.with_name(LAYER_PROMPTS), summary]
            return Entry(path / RUN_PROMPT, summary, _state(files))
        if folder_of_additions(path):
            return Entry(path, summary, _state([path / PROMPT, path / LAYER_PROMPTS, summary]))
        if peft.is_adapter(path):
            return Entry(path, summary, _state([path / peft.CONFIG, peft.weights_in(path), summary]))
        if (path / OFFICIAL_NAME).is_file():
            return Entry(path, summary, _state([path / OFFICIAL_NAME, summary]))
        return Entry(path, summary, _state([path, summary])) if is_t5x(path) else None
    if path.suffix == ".npy":
        summary = summary_of(path)
        beside = [path.with_name(name) for name in (PROMPT, LAYER_PROMPTS)] if folder_of_additions(path) else []
        return Entry(path, summary, _state([path, *beside, summary]))
    return None


def _state(paths: Sequence[Path]) -> tuple:
    return tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for path in paths if (stat := _stat(path)))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None

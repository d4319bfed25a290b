"""What a run leaves in MODEL_DIR, and how it finds its place again.

config.gin, metrics.jsonl, checkpoints/<step>/, prompts/<step>.npy, best/, summary.json, and TensorBoard events.
"""

import difflib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.parallel.processes import barrier, is_writer
from prompt_tuning_jax.prompts.files import write_prompt

_BASE = "\n# The base's fingerprint: "


class RunFolder:
    """MODEL_DIR of one run. Nothing is written before `open`.

    Of several processes, which see one file system, process 0 alone writes; all of them call all of this.

    Attributes:
      writes: whether this process does.
    """

    def __init__(self, path: str | os.PathLike, config: str = "", *, allow_other_config: bool = False):
        """Checks that the run may write to `path`.

        Args:
          config: the run's configuration, compared to that of a run already there.
          allow_other_config: go on with a run of another configuration.

        Raises:
          ValueError: the folder cannot be written, or holds another run.
        """
        self.path, self._config, self.writes = Path(path), config, is_writer()
        self.states: Any = None  # a StateStore, once it is open
        check_writable(self.path)
        kept = self.path / "config.gin"
        self._base = None  # the fingerprint of the base of a run already there
        if kept.exists() and not allow_other_config:
            text, _, base = kept.read_text(encoding="utf-8").partition(_BASE)
            self._base = base.strip() or None
            line = _first_difference(text, config)
            if line:
                raise ValueError(
                    f"{path} holds a run of another configuration ({line}): set another MODEL_DIR, "
                    "or give --allow_other_config to go on with this one"
                )

    def open(self, keep: int | None, base_fingerprint: str | None = None) -> None:
        """Makes the folder.

        Args:
          keep: the number of checkpoints to leave, all where None.
          base_fingerprint: of the base's weights; None for random ones.

        Raises:
          ValueError: the run already there is on other weights.
        """
        if base_fingerprint and self._base and self._base != base_fingerprint:
            raise ValueError(
                f"{self.path} holds a run on a base of fingerprint {self._base}, now it is {base_fingerprint}: "
                "set INITIAL_CHECKPOINT_PATH to the base that it began with, or set another MODEL_DIR"
            )
        barrier("compared")  # every process has read what lies there
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            base = f"{_BASE}{base_fingerprint}\n" if base_fingerprint else ""
            write_text(self.path / "config.gin", self._config + base)
            (self.path / "failed.txt").unlink(missing_ok=True)  # what a sweep left of an earlier attempt
        barrier("opened")
        self.states = StateStore(self.path / "checkpoints", keep)
        self._events = None

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forgets what was logged after `step`, whose checkpoint is the newest whole one; returns what stays."""
        path = self.path / "metrics.jsonl"
        records = [record for record in _read_whole_lines(path) if record["step"] <= step]
        barrier("read")
        if self.writes and path.exists():
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds a record to metrics.jsonl and to TensorBoard's events."""
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        if self._events is None:
            self._events = _event_writer(self.path)
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def keep_prompt(self, step: int, prompt: Array) -> None:
        """Writes prompts/<step>.npy."""
        if self.writes:
            write_prompt(self.path / "prompts" / f"{step}.npy", np.asarray(prompt))

    def close(self) -> None:
        if self.states is not None:
            self.states.close()
        if self._events is not None:
            self._events.close()


def _event_writer(path: Path):
    """TensorBoard's; it imports much, so not before the first record."""
    absent = "torch" not in sys.modules
    if absent:  # tensorboardX would import it, where it is installed, for nothing
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter(str(path))


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read_whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return  # the line that a kill cut short is the last


def check_writable(path: Path) -> None:
    """Raises ValueError where nothing can be written to `path`, which need not be there yet."""
    try:
        parent = path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write to {path} ({reason}): set MODEL_DIR to a folder that can be written") from None


def _first_difference(kept: str, new: str) -> str:
    lines = difflib.unified_diff(kept.splitlines(), new.splitlines(), lineterm="", n=0)
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "; ".join(f"{'was' if line[0] == '-' else 'is'} {line[1:].strip()}" for line in changed[:2])

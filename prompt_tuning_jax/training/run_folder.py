"""What a run leaves in MODEL_DIR, and how it finds its place again.

run.json (what the run is, by value), config.gin (where gin configured it), metrics.jsonl, checkpoints/<step>/,
prompts/<step>.npy, best/, summary.json, and TensorBoard events.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.checkpoints.tuned import is_one_file, write_prompts
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.identity import differences
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.parallel.processes import barrier, is_writer

IDENTITY = "run.json"


class NoFolder:
    """Stands for the folder of a run that writes nothing."""

    writes = False

    def __init__(self):
        self.states = _NoStates()

    def open(self, keep: int | None, read: Mapping[str, Any]) -> list[str]:
        return []

    def rewind(self, step: int) -> list[dict[str, Any]]:
        return []

    def log(self, record: Mapping[str, Any]) -> None:
        pass

    def keep_prompt(self, step: int, injection: Injection) -> None:
        pass

    def close(self) -> None:
        pass


class _NoStates:
    def steps(self) -> list[int]:
        return []

    def save(self, step: int, state: Any) -> None:
        pass


class RunFolder:
    """MODEL_DIR of one run. Nothing is written before `open`.

    With several processes, process 0 alone writes; every process must call every method, and they must share a file
    system.

    Attributes:
      writes: whether this process does.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        identity: Mapping[str, Any],
        config: str = "",
        *,
        allow_other_config: bool = False,
    ):
        """Checks that the run may write to `path`.

        Args:
          identity: what the run is, by value, as far as it is known before anything is read; compared with the run that
            is there already. More steps than before are no other run.
          config: the gin configuration, for config.gin.
          allow_other_config: go on with a run of another identity.

        Raises:
          ValueError: the folder cannot be written, or holds another run.
        """
        self.path, self._identity, self._config, self.writes = Path(path), dict(identity), config, is_writer()
        self._forced = allow_other_config
        self.states: Any = None  # a StateStore, once it is open
        check_writable(self.path)
        self._kept = _read_identity(self.path)
        if self._kept is None and (self.path / "checkpoints").is_dir() and not allow_other_config:
            raise SettingError(
                f"{path} holds a run without {IDENTITY}, so that nobody can tell whether it is this one: set another ",
                Setting("model_dir"),
                ", or ",
                Setting("allow_other_config"),
                " to go on with it",
            )
        self._compare(self._identity)

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Raises SettingError if the run that is there already is another one."""
        if self._kept is None or self._forced:
            return
        kept = {name: self._kept.get(name) for name in now}
        if _extends(kept, now):
            kept["train_steps"] = now["train_steps"]
        found = [*itertools.islice(differences(kept, now), 2)]
        if found:
            what = "; ".join(f"{path} was {_short(was)}, is {_short(value)}" for path, was, value in found)
            raise SettingError(
                f"{self.path} holds another run ({what}): set another ",
                Setting("model_dir"),
                ", or give ",
                Setting("allow_other_config"),
                " to go on with this one",
            )

    def open(self, keep: int | None, read: Mapping[str, Any]) -> list[str]:
        """Makes the folder.

        Args:
          keep: the number of checkpoints to leave; None for all.
          read: what else the run is: the fingerprints of all that it reads.

        Returns:
          Lines to say: that a run is extended.

        Raises:
          ValueError: the run that is there already reads something else.
        """
        self._compare(read)
        barrier("compared")  # every process has read what lies there
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / IDENTITY, json.dumps(self._identity | dict(read), indent=1) + "\n")
            if self._config:
                write_text(self.path / "config.gin", self._config)
            (self.path / "failed.txt").unlink(missing_ok=True)  # what a sweep left of an earlier attempt
        barrier("opened")
        self.states = StateStore(self.path / "checkpoints", keep)
        self._events = None
        if self._kept is not None and _extends(self._kept, self._identity):
            steps = f"from {self._kept['train_steps']:,} to {self._identity['train_steps']:,} steps"
            return [f"{self.path} is extended {steps}: it goes on from its last checkpoint"]
        return []

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forgets what was logged after `step`, whose checkpoint is the newest whole one; returns what stays."""
        path = self.path / "metrics.jsonl"
        records = [record for record in _read_whole_lines(path) if record["step"] <= step]
        barrier("read")
        if self.writes and path.exists():
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a record to metrics.jsonl and to TensorBoard's events."""
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is None:
            self._events = _event_writer(self.path)
        for name, value in record.items():
            if name not in ("step", "split"):
                self._events.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def keep_prompt(self, step: int, injection: Injection) -> None:
        """Writes prompts/<step>.npy, [P, D], or [L, P, D] of a prompt per layer; nothing if there is no prompt.

        A prompt with additions per layer becomes a folder, prompts/<step>, and so do prompts per task.
        """
        if self.writes and injection.length:
            write_prompts(self.path / "prompts" / f"{step}{'.npy' if is_one_file(injection) else ''}", injection)

    def close(self) -> None:
        if self.states is not None:
            self.states.close()
        if self._events is not None:
            self._events.close()


def _event_writer(path: Path):
    """Returns TensorBoard's writer; it imports much, so not before the first record."""
    absent = "torch" not in sys.modules
    if absent:  # tensorboardX would import it, where it is installed, for nothing; forgotten again below
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if absent:
            del sys.modules["torch"]
    return SummaryWriter(str(path))


def _read_identity(path: Path) -> dict[str, Any] | None:
    """Returns what the run in a folder is; None if there is none."""
    try:
        found = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingError(f"{path / IDENTITY} cannot be read ({error}): set another ", Setting("model_dir")) from None
    if not isinstance(found, dict):
        raise SettingError(f"{path / IDENTITY} holds no object: set another ", Setting("model_dir"))
    return found


def kept_eval_period(path: str | os.PathLike) -> int | None:
    """Returns the evaluation period of the run in a folder; None if there is no run.

    Raises:
      ValueError: what the run is cannot be read.
    """
    period = (_read_identity(Path(path)) or {}).get("eval_period")
    return period if isinstance(period, int) else None


def _extends(kept: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Returns whether the run is the one that is there, with more steps."""
    was, steps = kept.get("train_steps"), now.get("train_steps")
    return isinstance(was, int) and isinstance(steps, int) and steps > was


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
    """Raises SettingError if nothing can be written to `path`, which need not be there yet."""
    try:
        parent = path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingError(
            f"cannot write to {path} ({reason}): set ", Setting("model_dir"), " to a folder that can be written"
        ) from None

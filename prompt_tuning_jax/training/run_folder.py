"""Reads and writes the files of a run in MODEL_DIR, and resumes an interrupted run from them.

run.json             the run's identity: its settings, and the fingerprints of its model, tokenizer and data
config.gin           the gin configuration, if the run was configured with gin
metrics.jsonl        a record per log period and per evaluation
checkpoints/<step>/  the training state
prompts/<step>.npy   the prompt at the start and at each evaluation
best/                what was trained, at the best evaluation
summary.json         the results, once the run is finished
running              the process that runs the folder now
events.*             the records for TensorBoard
profile/             a trace of some steps, with `train --profile=STEPS`

A checkpoint also has the evaluations up to its step, and hashes of metrics.jsonl and of best/. When the run resumes, a
damaged or deleted file is detected with the hashes, and is written again from the other files.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.batches.lock import claimed, running_elsewhere
from prompt_tuning_jax.checkpoints.state import StateStore, all_agree
from prompt_tuning_jax.checkpoints.tuned import is_one_file, write_prompts
from prompt_tuning_jax.errors import NO_ROOM, Setting, SettingError
from prompt_tuning_jax.identity import differences
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.parallel.processes import barrier, is_writer

IDENTITY = "run.json"
HASHED_BYTES = 64 * 2**20  # if best/ is larger, as with a tuned model, its hash covers only file names and sizes

Record = dict[str, Any]


class NoFolder:
    """Replaces `RunFolder` for a run that writes nothing."""

    writes = False

    def __init__(self):
        self.states = _NoStates()

    def open(self, keep: int | None, read: Mapping[str, Any]) -> list[str]:
        return []

    def rewind(self, step: int) -> tuple[list[Record], list[str]]:
        return [], []

    def logged(self) -> dict[str, Any]:
        return {}

    def log(self, record: Mapping[str, Any]) -> None:
        pass

    def keep_prompt(self, step: int, injection: Injection) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _NoStates:
    def steps(self) -> list[int]:
        return []

    def restore_newest(self, like: Any) -> tuple[int, Any, list[str]]:
        return 0, like, []

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        pass


class RunFolder:
    """Reads and writes MODEL_DIR, the folder of one run. Nothing is written before `open`.

    With several processes, only process 0 writes these files. Every process must call every method, and the processes
    must share a file system.

    Attributes:
      path: the folder.
      writes: whether this process writes.
      states: the checkpoints, a `StateStore`; None before `open`.
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
          identity: the settings that decide whether a run may resume. They must equal those of the run that is in the
            folder already, except that `train_steps` may be larger: the run is then extended.
          config: the gin configuration as text, for config.gin.
          allow_other_config: whether to resume a run with another identity.

        Raises:
          ValueError: the folder is not writable, holds another run, or is in use by another process.
        """
        self.path, self._identity, self._config, self.writes = Path(path), dict(identity), config, is_writer()
        self._forced = allow_other_config
        self.states: Any = None  # a StateStore, once it is open
        self._events: Any = None
        self._lock = contextlib.ExitStack()
        self._lines, self._digest = 0, hashlib.sha256()  # of metrics.jsonl
        check_writable(self.path)
        if (busy := running_elsewhere(self.path)) is not None:
            raise _in_use(busy)
        self._recorded = _read_identity(self.path)
        if self._recorded is None and (self.path / "checkpoints").is_dir() and not allow_other_config:
            raise SettingError(
                f"{path} holds a run without {IDENTITY}, so it cannot be compared with this run: set another ",
                Setting("model_dir"),
                ", or ",
                Setting("allow_other_config"),
                " to go on with it",
            )
        self._compare(self._identity)

    def _compare(self, now: Mapping[str, Any]) -> None:
        """Raises SettingError if the folder already has a run whose identity differs from `now`."""
        if self._recorded is None or self._forced:
            return
        recorded = {name: self._recorded.get(name) for name in now}
        if _extends(recorded, now):
            recorded["train_steps"] = now["train_steps"]
        found = [*itertools.islice(differences(recorded, now), 2)]
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
        """Makes the folder if needed, locks it for this run, and writes run.json and config.gin.

        Args:
          keep: the number of checkpoints to keep, the latest; None for all.
          read: the rest of the identity: the fingerprints of the model, the tokenizer and the data.

        Returns:
          A line if the run is extended to more steps; otherwise an empty list.

        Raises:
          ValueError: the run in the folder has another model, tokenizer or data, or another process uses the folder.
        """
        self._compare(read)
        barrier("compared")  # process 0 writes only after every process has compared
        self._take_lock()
        try:
            return self._open(keep, read)
        except BaseException as error:
            self._lock.close()
            raise full_disk(error, self.path) from None

    def _take_lock(self) -> None:
        refused: ValueError | None = None
        if self.writes:
            try:
                self._lock.enter_context(claimed(self.path))
            except OSError as error:
                refused = _unwritable(self.path, error)
            except ValueError as error:
                refused = _in_use(str(error))
        if not all_agree(refused is None):
            raise refused or _in_use(f"process 0 cannot have {self.path} for itself")

    def _open(self, keep: int | None, read: Mapping[str, Any]) -> list[str]:
        self._recorded = _read_identity(self.path)  # read again: the lock now keeps other runs from changing it
        self._compare(self._identity)
        self._compare(read)
        barrier("read again")
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / IDENTITY, json.dumps(self._identity | dict(read), indent=1) + "\n")
            if self._config:
                write_text(self.path / "config.gin", self._config)
            (self.path / "failed.txt").unlink(missing_ok=True)  # what a sweep left of an earlier attempt
        barrier("opened")
        self.states = StateStore(self.path / "checkpoints", keep)
        if self._recorded is not None and _extends(self._recorded, self._identity):
            steps = f"from {self._recorded['train_steps']:,} to {self._identity['train_steps']:,} steps"
            return [f"{self.path} is extended {steps}: it goes on from its last checkpoint"]
        return []

    def rewind(self, step: int) -> tuple[list[Record], list[str]]:
        """Removes the records after `step` from metrics.jsonl, and repairs the file if it is damaged.

        Args:
          step: the step of the checkpoint from which the run resumes; 0 for none.

        Returns:
          The records up to `step`; and a line if the file was damaged. Its evaluations then come from the checkpoint.

        Raises:
          ValueError: the file is damaged, and the checkpoint has no evaluations, because an earlier version wrote it.
        """
        path = self.path / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        checkpointed = self.states.extra(step) if step else {}
        records, lines = _records_until(step, data, checkpointed, path)
        text = "".join(json.dumps(record) + "\n" for record in records)
        barrier("read")
        if self.writes and text.encode() != data:
            write_text(path, text)
        self._lines, self._digest = len(records), hashlib.sha256(text.encode())
        return records, lines

    def logged(self) -> dict[str, Any]:
        """Returns the hashes of metrics.jsonl and best/ that a checkpoint stores, to detect damage when it resumes."""
        metrics = {"lines": self._lines, "sha256": self._digest.hexdigest()[:16]}
        return {"metrics": metrics, "best": self.best_hash() if self.writes else None}

    def best_hash(self) -> str | None:
        """Returns a hash of the files in best/, as 16 hexadecimal digits; None if there are none."""
        files = [path for path in sorted((self.path / "best").rglob("*")) if path.is_file()]
        digest, small = hashlib.sha256(), sum(path.stat().st_size for path in files) <= HASHED_BYTES
        for path in files:
            digest.update(f"{path.relative_to(self.path)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes() if small else b"")
        return digest.hexdigest()[:16] if files else None

    def best_matches(self, step: int) -> bool:
        """Returns, on all processes, whether best/ has the hash that the checkpoint of `step` stores.

        If the checkpoint stores none, because an earlier version wrote it, any best/ that exists is accepted.
        """
        found, checkpointed = self.best_hash() if self.writes else None, self.states.extra(step)
        return all_agree(not self.writes or (found is not None and found == checkpointed.get("best", found)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to metrics.jsonl and to TensorBoard's events. All its numbers must be finite."""
        line = json.dumps(record, allow_nan=False) + "\n"
        self._lines += 1
        self._digest.update(line.encode())
        if not self.writes:
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line)
        if self._events is None:
            self._events = _Events(self.path)
        self._events.write(record)

    def keep_prompt(self, step: int, injection: Injection) -> None:
        """Writes the prompt to prompts/<step>.npy: [P, D], or [L, P, D] if there is one per encoder layer.

        A prompt with additions per layer becomes a folder, prompts/<step>, and so do prompts per task. If there is no
        prompt, nothing is written.
        """
        if self.writes and injection.length:
            write_prompts(self.path / "prompts" / f"{step}{'.npy' if is_one_file(injection) else ''}", injection)

    def kept_prompt(self, step: int) -> Path | None:
        """Returns the path of what `keep_prompt` wrote at a step; None if it is not there."""
        paths = (self.path / "prompts" / f"{step}{end}" for end in (".npy", ""))
        return next((path for path in paths if path.exists()), None)

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        if self.states is not None:
            self.states.wait()

    def close(self) -> None:
        """Closes all files, and unlocks the folder for other processes. It may be called more than once."""
        with self._lock:
            if self._events is not None:
                self._events.close()
                self._events = None
            if self.states is not None:
                self.states.close()

    def abandon(self) -> None:
        """Closes the folder after an error. Errors of closing are suppressed, so that they do not hide the first error.

        With several processes, it does not wait for checkpoints that are being written, because other processes may
        have died.
        """
        with self._lock, contextlib.suppress(Exception):
            if jax.process_count() == 1:
                self.close()


class _Events:
    """Writes records to TensorBoard's events. Importing tensorboardX takes long, so it waits for the first record.

    Its SummaryWriter has a thread, whose error would be printed there and lost here. So each record is written at once.
    """

    def __init__(self, path: Path) -> None:
        absent = "torch" not in sys.modules
        if absent:  # keep tensorboardX from importing an installed torch, which it does not need here
            sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event
        finally:
            if absent:
                del sys.modules["torch"]
        self._event, self._scalar, self._writer = Event, summary.scalar, EventsWriter(str(path / "events"))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name not in ("step", "split"):
                scalar = self._scalar(f"{record['split']}/{name}", value)
                self._writer.write_event(self._event(wall_time=time.time(), step=record["step"], summary=scalar))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _read_identity(path: Path) -> dict[str, Any] | None:
    """Returns the identity of the run in a folder, from run.json; None if there is no such file."""
    try:
        found = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingError(f"{path / IDENTITY} cannot be read ({error}): set another ", Setting("model_dir")) from None
    if not isinstance(found, dict):
        raise SettingError(f"{path / IDENTITY} holds no object: set another ", Setting("model_dir"))
    return found


def recorded_eval_period(path: str | os.PathLike) -> int | None:
    """Returns the evaluation period of the run in a folder; None if there is no run.

    Raises:
      ValueError: run.json cannot be read.
    """
    period = (_read_identity(Path(path)) or {}).get("eval_period")
    return period if isinstance(period, int) else None


def _extends(kept: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Returns whether `now` has more training steps than `kept`."""
    was, steps = kept.get("train_steps"), now.get("train_steps")
    return isinstance(was, int) and isinstance(steps, int) and steps > was


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: it has the whole text, or stays as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _records_until(step: int, data: bytes, kept: Mapping[str, Any], path: Path) -> tuple[list[Record], list[str]]:
    """Returns the records of metrics.jsonl up to `step`, and a line if the file was damaged.

    Args:
      data: the content of the file.
      kept: what the checkpoint of `step` stores beside the state: the evaluations and the file's hash.
      path: the file, for messages.

    Raises:
      ValueError: a record is damaged, and the checkpoint stores no evaluations.
    """
    if not step:
        return [], []
    lines = data.splitlines(keepends=True)
    wanted = kept.get("metrics")
    if not wanted:
        return [record for record in _checked_records(lines, path) if record["step"] <= step], []
    whole = lines[: wanted["lines"]]
    if hashlib.sha256(b"".join(whole)).hexdigest()[:16] == wanted["sha256"]:
        return [json.loads(line) for line in whole], []
    losses: dict[int, Record] = {}
    for line in lines:
        record = _record(line)
        if record is not None and record["split"] == "train" and record["step"] <= step:
            losses.setdefault(record["step"], record)
    records = sorted([*losses.values(), *kept["evals"]], key=lambda record: (record["step"], record["split"] == "eval"))
    lost = wanted["lines"] - len(records)
    return records, [
        f"{path} is not as it was at step {step}: its evaluations are those that the checkpoint keeps"
        + (f", {lost} of its other records are lost" if lost > 0 else "")
    ]


def _checked_records(lines: list[bytes], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            yield record
        elif number < len(lines) or line.endswith(b"\n"):  # a partial last line is from a killed process: ignore it
            raise SettingError(
                f"{path}, line {number}: invalid record, so the run's best step is unknown: correct the line, or set "
                "another ",
                Setting("model_dir"),
            )


def _record(line: bytes) -> Record | None:
    """Parses a line of metrics.jsonl; returns None if it is not a valid record."""
    try:
        record = json.loads(line)
        numbers = [value for name, value in record.items() if name != "split"]
        finite = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
        whole = finite and type(record["step"]) is int and record["split"] in ("train", "eval") and "seconds" in record
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    return record if whole else None


def _in_use(why: str) -> SettingError:
    return SettingError(f"{why}; or set another ", Setting("model_dir"))


def full_disk(error: BaseException, path: str | os.PathLike | None) -> BaseException:
    """Returns the error of a full disk as a SettingError that names the run's folder `path`; other errors unchanged."""
    # The subclasses of OSError are other errors: a ChildProcessError, for example, has no number either.
    if type(error) is not OSError or error.errno not in NO_ROOM or path is None:
        return error
    return SettingError(
        f"no room for the run in {path} ({error.strerror or error}): free disk space, or set ",
        Setting("model_dir"),
        " to a folder on another disk; the same command goes on from the last checkpoint",
    )


def _unwritable(path: Path, error: OSError) -> SettingError:
    reason = error.strerror or str(error)
    return SettingError(
        f"cannot write to {path} ({reason}): set ", Setting("model_dir"), " to a folder that can be written"
    )


def check_writable(path: Path) -> None:
    """Raises SettingError if no file can be written in the folder `path`, which need not exist yet."""
    try:
        parent = path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise _unwritable(path, error) from None

"""The training state on disk, through Orbax: small, atomic, written while training goes on.

Each checkpoint has a checksum of its values, which is compared when it is restored. Orbax is slow to import, and is
not imported where no state is read or written.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from prompt_tuning_jax.checkpoints.base import fingerprint
from prompt_tuning_jax.errors import Setting, SettingError

METADATA = "_CHECKPOINT_METADATA"  # Orbax's name of the file that keeps what `save` is given beside a state
KEYS = frozenset(
    ("item_handlers", "metrics", "performance_metrics", "init_timestamp_nsecs", "commit_timestamp_nsecs",
     "custom_metadata")
)  # fmt: skip
CHECKSUM = "checksum"


class StateStore:
    """`MODEL_DIR/checkpoints/<step>`: every state saved; the frozen base is never among it."""

    def __init__(self, folder: str | os.PathLike, keep: int | None = None):
        """Of several processes, all call all of this, on one file system.

        Args:
          keep: the number of latest checkpoints to leave; all where None.
        """
        self._folder, self._keep = Path(folder).absolute(), keep
        self._folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        self._remove_damaged_metadata()
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True)
        handler = ocp.StandardCheckpointHandler()
        with _hushed():
            return ocp.CheckpointManager(self._folder, options=options, item_handlers=handler)

    def _remove_damaged_metadata(self) -> None:
        """Removes metadata that are no JSON of Orbax's: it would open none of the checkpoints.

        A checkpoint without metadata counts as damaged.
        """
        if jax.process_index() == 0:
            for path in self._folder.glob(f"*/{METADATA}"):
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                    whole = isinstance(found, dict) and {*found} <= KEYS
                except (OSError, ValueError):
                    whole = False
                if not whole:
                    path.unlink(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metadata")

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that were written to their end, in order."""
        return sorted(self._manager.all_steps()) if any(self._folder.iterdir()) else []

    def save(self, step: int, state: Any, beside: Mapping[str, Any] | None = None) -> None:
        """Starts to write `state`; a checkpoint of that step that is already there stands.

        Args:
          beside: what else the checkpoint keeps, as JSON can hold it. With several processes, process 0's is kept.
        """
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            # Of several processes each writes what lies on its devices; what one alone has is small, or on its host.
            saved = state if jax.process_count() > 1 else jax.tree.map(np.asarray, state)
            # A copy, since Orbax writes it later.
            kept = json.loads(json.dumps(beside or {}))
            kept[CHECKSUM] = checksum(state, kept)
            with _raised_in_words(f"checkpoint {step} cannot be written to {self._folder}"):
                self._manager.save(step, args=ocp.args.StandardSave(saved), custom_metadata=kept)

    def beside(self, step: int) -> dict[str, Any]:
        """Returns what the checkpoint of `step` keeps beside its state; nothing if it is an earlier version's.

        Raises:
          ValueError: it cannot be read.
        """
        path = self._folder / str(step) / METADATA
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))["custom_metadata"] or {}
            return {name: kept[name] for name in kept if name != CHECKSUM}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{METADATA} cannot be read: {error}") from None

    def _checksum(self, step: int) -> str | None:
        """Returns the checksum that a checkpoint was saved with; None if it is an earlier version's."""
        kept = json.loads((self._folder / str(step) / METADATA).read_text(encoding="utf-8"))["custom_metadata"]
        return str(kept.get(CHECKSUM)) if kept else None

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of `step`, with the structure, shapes and dtypes of `like`.

        Raises:
          ValueError: the checkpoint is damaged, or of another structure.
        """
        state, reason = self._restored(step, like)
        if reason:
            folder = Setting("model_dir")
            raise SettingError(
                f"checkpoint {step} in ",
                folder,
                f" cannot be restored ({reason}): delete its folder, or set another ",
                folder,
            )
        return state

    def restore_newest(self, like: Any) -> tuple[int, Any, list[str]]:
        """Restores the newest checkpoint that is whole, and deletes damaged ones that are newer.

        Args:
          like: as of `restore`.

        Returns:
          The step and the state, 0 and `like` if there is no checkpoint; and a line about each one that is damaged.

        Raises:
          ValueError: there are checkpoints, and none can be restored. Nothing is deleted then.
        """
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in reversed(steps):
            state, reason = self._restored(step, like)
            if not reason:
                for newer in damaged:
                    self._manager.delete(newer)
                goes_on = f"going on from checkpoint {step}"
                return step, state, [f"checkpoint {one} is damaged ({why}): {goes_on}" for one, why in damaged.items()]
            damaged[step] = reason
        if damaged:
            folder, several = Setting("model_dir"), f", nor can the {len(steps) - 1} before it" if steps[1:] else ""
            raise SettingError(
                f"checkpoint {steps[-1]} in ",
                folder,
                f" cannot be restored ({damaged[steps[-1]]}){several}: delete its folder, or set another ",
                folder,
            )
        return 0, like, []

    def _restored(self, step: int, like: Any) -> tuple[Any, str]:
        """Returns the state of `step`, or why it cannot be restored, on which all processes agree."""
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state, reason, beside, wanted = None, "", {}, None
        try:
            with _hushed():
                state = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
                beside, wanted = self.beside(step), self._checksum(step)
        except jax.errors.JaxRuntimeError:  # of a device, or of another process
            raise
        except Exception as error:  # any: TensorStore's are plain exceptions
            reason = _first_line(error)
        if not all_agree(not reason):
            return None, reason or "another process cannot read its part of it"
        if wanted is not None and wanted != checksum(state, beside):
            return None, "its values are not those that were saved: the checksum differs"
        return state, ""

    def wait(self) -> None:
        """Returns once all that was saved is on disk."""
        if "_manager" in vars(self):
            with _raised_in_words(f"a checkpoint cannot be written to {self._folder}"):
                self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in vars(self):
            try:
                self.wait()
            finally:
                manager = vars(self).pop("_manager")
                with contextlib.suppress(Exception):  # `wait` has raised it, if it is a failed write's
                    manager.close()


def checksum(state: Any, beside: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that change with any value of a state, or of what lies beside it.

    They are the same on any mesh.
    """
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    text = f"{fingerprint(leaves)} {json.dumps(beside, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_agree(value: bool) -> bool:
    """Returns whether `value` is true on every process. All processes call this."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


_HUSHED = threading.RLock()
LATE_READS = 0.5  # seconds that the other reads of a failed restore are given to end


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Hides what Orbax says of a failure beside raising it.

    It logs tracebacks, and leaves a failed restore's other reads running, each of which would print through
    `sys.unraisablehook` that its event loop is closed. Both are as they were when this context ends.
    """
    with _HUSHED:  # one thread at a time, so that each puts back what it found
        show, level = sys.unraisablehook, logging.get_verbosity()

        def hook(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                show(unraisable)

        sys.unraisablehook = hook
        logging.set_verbosity(logging.FATAL)
        try:
            yield
        except BaseException:
            time.sleep(LATE_READS)
            raise
        finally:
            sys.unraisablehook = show
            logging.set_verbosity(level)


@contextlib.contextmanager
def _raised_in_words(what: str) -> Iterator[None]:
    """Turns whatever Orbax raises of a write that failed into one line: of a full disk it raises a plain exception."""
    try:
        with _hushed():
            yield
    except jax.errors.JaxRuntimeError:  # of a device, or of another process
        raise
    except Exception as error:
        raise SettingError(
            f"{what} ({_first_line(error)}): make room, or set ", Setting("model_dir"), " to a disk that has it; what "
            "was saved before stands",
        ) from None  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = [*filter(None, map(str.strip, str(error).splitlines()))]
    return (lines or [type(error).__name__])[0][:200]

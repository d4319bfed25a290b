"""Saves and restores the training state with Orbax, atomically, and writes it while training goes on.

Each checkpoint has a checksum of its values, which is compared when the checkpoint is restored. Orbax is slow to
import, so it is imported only when a state is read or written.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from prompt_tuning_jax.checkpoints.base import fingerprint
from prompt_tuning_jax.errors import Setting, SettingError

METADATA = "_CHECKPOINT_METADATA"  # the file in which Orbax keeps the JSON that `save` takes beside a state
KEYS = frozenset(
    ("item_handlers", "metrics", "performance_metrics", "init_timestamp_nsecs", "commit_timestamp_nsecs",
     "custom_metadata")
)  # fmt: skip
CHECKSUM = "checksum"


class StateStore:
    """Saves states in `MODEL_DIR/checkpoints/<step>`. The frozen base model is not part of a state."""

    def __init__(self, folder: str | os.PathLike, keep: int | None = None):
        """Creates the folder if it does not exist.

        With several processes, every process must call every method, and they must share a file system.

        Args:
          keep: the number of latest checkpoints to keep; None keeps all.
        """
        self._folder, self._keep = Path(folder).absolute(), keep
        self._quiet = contextlib.ExitStack()
        self._writes = False
        self._folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        self._remove_damaged_metadata()
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True)
        handler = ocp.StandardCheckpointHandler()
        with _QUIET:
            return ocp.CheckpointManager(self._folder, options=options, item_handlers=handler)

    def _remove_damaged_metadata(self) -> None:
        """Removes each metadata file that is not Orbax's JSON, because it would keep Orbax from opening any checkpoint.

        A checkpoint without metadata counts as damaged.
        """
        if jax.process_index() == 0:
            for path in self._folder.glob(f"*/{METADATA}"):
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                    valid = isinstance(found, dict) and {*found} <= KEYS
                except (OSError, ValueError):
                    valid = False
                if not valid:
                    path.unlink(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("metadata")

    def steps(self) -> list[int]:
        """Returns the steps of the completely written checkpoints, in ascending order."""
        return sorted(self._manager.all_steps()) if any(self._folder.iterdir()) else []

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to write `state`. If there already is a checkpoint of this step, it is kept and nothing is written.

        Args:
          extra: more values for the checkpoint, which JSON can hold. With several processes, process 0's are kept.
        """
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            # With several processes, each writes the shards of its own devices. With one process, the state is copied
            # to the host, because it is small or already there.
            saved = state if jax.process_count() > 1 else jax.tree.map(np.asarray, state)
            # A copy, because Orbax writes it later.
            metadata = json.loads(json.dumps(extra or {}))
            metadata[CHECKSUM] = checksum(state, metadata)
            if not self._writes:  # from now on, Orbax may fail at any time until `close`
                self._quiet.enter_context(_QUIET)
                self._writes = True
            with _setting_error(f"checkpoint {step} cannot be written to {self._folder}"):
                self._manager.save(step, args=ocp.args.StandardSave(saved), custom_metadata=metadata)

    def extra(self, step: int) -> dict[str, Any]:
        """Returns the values that `save` got as `extra`; {} if an earlier version wrote the checkpoint.

        Raises:
          ValueError: the checkpoint's metadata cannot be read.
        """
        path = self._folder / str(step) / METADATA
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))["custom_metadata"] or {}
            return {name: metadata[name] for name in metadata if name != CHECKSUM}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{METADATA} cannot be read: {error}") from None

    def _checksum(self, step: int) -> str | None:
        """Returns the checksum that a checkpoint was saved with; None if an earlier version wrote the checkpoint."""
        metadata = json.loads((self._folder / str(step) / METADATA).read_text(encoding="utf-8"))["custom_metadata"]
        return str(metadata.get(CHECKSUM)) if metadata else None

    def restore(self, step: int, like: Any) -> Any:
        """Returns the state of `step`, with the structure, shapes and dtypes of `like`.

        Raises:
          ValueError: the checkpoint is damaged, or has another structure.
        """
        state, reason = self._try_restore(step, like)
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
        """Restores the newest checkpoint that is not damaged, and deletes the damaged ones that are newer.

        Args:
          like: see `restore`.

        Returns:
          The step and the state, or 0 and `like` if there is no checkpoint; and one line per damaged checkpoint.

        Raises:
          ValueError: there are checkpoints, but none can be restored. No checkpoint is deleted then.
        """
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in reversed(steps):
            state, reason = self._try_restore(step, like)
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

    def _try_restore(self, step: int, like: Any) -> tuple[Any, str]:
        """Returns the state of `step` and "", or None and why it cannot be restored. All processes agree which."""
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        state, reason, extra, expected = None, "", {}, None
        with _QUIET:
            try:
                state = _placed_like(like, self._manager.restore(step, args=ocp.args.StandardRestore(shapes)))
                extra, expected = self.extra(step), self._checksum(step)
            except jax.errors.JaxRuntimeError:  # an error of a device or of another process
                raise
            except Exception as error:  # of any type: TensorStore raises plain exceptions
                reason = _first_line(error)
            if reason:
                _QUIET.wait_for_other_failures()
        if not all_agree(not reason):
            return None, reason or "another process cannot read its part of it"
        if expected is not None and expected != checksum(state, extra):
            return None, "its values are not those that were saved: the checksum differs"
        return state, ""

    def wait(self) -> None:
        """Waits until all saved states are on disk.

        Raises:
          SettingError: a state could not be written.
        """
        if "_manager" in vars(self):
            with _setting_error(f"a checkpoint cannot be written to {self._folder}"):
                self._manager.wait_until_finished()

    def close(self) -> None:
        if "_manager" in vars(self):
            try:
                self.wait()
            finally:
                manager = vars(self).pop("_manager")
                with contextlib.suppress(Exception):  # `wait` has already raised the error of a failed write
                    manager.close()
                self._quiet.close()
                self._writes = False


def _placed_like(like: Any, restored: Any) -> Any:
    """Returns what was restored, with the arrays uncommitted that are uncommitted in `like`.

    Orbax commits every array to a device. For committed arrays JAX makes another program of the same function, which
    the compilation cache of the first start does not have. So a run that goes on would compile its step and its
    evaluation anew.
    """
    leaves, structure = jax.tree.flatten(restored)
    del restored  # so that each array can be freed when it has been copied
    for index, leaf in enumerate(jax.tree.leaves(like)):
        if isinstance(leaf, jax.Array) and not leaf.committed:
            leaves[index] = jnp.asarray(np.asarray(leaves[index]))
    return jax.tree.unflatten(structure, leaves)


def checksum(state: Any, extra: Mapping[str, Any]) -> str:
    """Returns 16 hexadecimal digits that change with any value of `state` or of `extra`, but not with the mesh."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    text = f"{fingerprint(leaves)} {json.dumps(extra, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_agree(value: bool) -> bool:
    """Returns whether `value` is true on every process. All processes must call this function."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


_ASYNCIO_LOG = logging.getLogger("asyncio")
LATE = 0.5  # seconds to wait for the other reads or writes of a failed restore or save


class _Quiet:
    """A context that hides what Orbax prints about a failure in addition to raising it.

    Orbax logs tracebacks. It also leaves the other reads or writes of a failure running, and each of these would print
    through `sys.unraisablehook` that its event loop is closed or that it did not end. The log level and the hook are
    reset when the last of the contexts ends that several threads and stores may have entered. If one of the other reads
    or writes fails as well, asyncio logs its traceback when it is freed, which may be when the process ends; see
    `_is_not_of_orbax`.
    """

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0
        self._show, self._level = sys.unraisablehook, absl_logging.get_verbosity()

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._show, self._level = sys.unraisablehook, absl_logging.get_verbosity()
                sys.unraisablehook = self._hook
                absl_logging.set_verbosity(absl_logging.FATAL)
            self._entered += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.wait_for_other_failures()
        with self._lock:
            self._entered -= 1
            if not self._entered:
                sys.unraisablehook = self._show
                absl_logging.set_verbosity(self._level)

    def wait_for_other_failures(self) -> None:
        """Waits for the other reads or writes of a failure, and frees those whose exception nobody holds."""
        _ASYNCIO_LOG.addFilter(_is_not_of_orbax)  # once: a filter that is there already is not added again
        time.sleep(LATE)
        gc.collect()

    def _hook(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" and not _is_of_orbax(unraisable.exc_traceback):
            self._show(unraisable)


def _is_of_orbax(trace: types.TracebackType | None) -> bool:
    """Returns whether a traceback goes through Orbax."""
    return any(frame.f_globals.get("__name__", "").startswith("orbax.") for frame, _ in traceback.walk_tb(trace))


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Returns whether what asyncio logs is not an exception of a read or write of Orbax."""
    return not _is_of_orbax(record.exc_info[2] if record.exc_info else None)


_QUIET = _Quiet()


@contextlib.contextmanager
def _setting_error(what: str) -> Iterator[None]:
    """Raises a SettingError of one line for a failed write; Orbax raises a plain exception if the disk is full."""
    try:
        with _QUIET:
            yield
    except jax.errors.JaxRuntimeError:  # an error of a device or of another process
        raise
    except Exception as error:
        raise SettingError(
            f"{what} ({_first_line(error)}): free disk space, or set ",
            Setting("model_dir"),
            " to a folder on another disk; earlier checkpoints are unchanged",
        ) from None


def _first_line(error: Exception) -> str:
    lines = [*filter(None, map(str.strip, str(error).splitlines()))]
    return (lines or [type(error).__name__])[0][:200]

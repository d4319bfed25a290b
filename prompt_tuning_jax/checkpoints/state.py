"""The training state on disk, through Orbax: small, atomic, written while training goes on.

Orbax is slow to import, and whoever neither reads nor writes a state does without.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.errors import Setting, SettingError


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

        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=True)
        handler = ocp.StandardCheckpointHandler()
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handler)

    def steps(self) -> list[int]:
        """Of the whole checkpoints."""
        return sorted(self._manager.all_steps()) if any(self._folder.iterdir()) else []

    def save(self, step: int, state: Any) -> None:
        """Starts to write `state`; a checkpoint of that step that is already there stands."""
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            # Of several processes each writes what lies on its devices; what one alone has is small, or on its host.
            saved = state if jax.process_count() > 1 else jax.tree.map(np.asarray, state)
            self._manager.save(step, args=ocp.args.StandardSave(saved))

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, with the structure, shapes and dtypes of `like`.

        Raises:
          ValueError: the checkpoint is not whole, or of another structure.
        """
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            with _closed_loops_hushed():
                return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            folder = Setting("model_dir")
            raise SettingError(
                f"checkpoint {step} in ",
                folder,
                f" cannot be restored ({str(error).splitlines()[0][:200]}): delete that step's folder, or set another ",
                folder,
            ) from None

    def wait(self) -> None:
        """Returns once all that was saved is on disk."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        if "_manager" in vars(self):
            self._manager.close()


_RESTORING = threading.Lock()
LATE_READS = 0.5  # seconds that the other reads of a failed restore are given to end


@contextlib.contextmanager
def _closed_loops_hushed() -> Iterator[None]:
    """Hides that Orbax leaves a failed restore's other reads running: each would print that its event loop is closed.

    tensorstore's threads print it through `sys.unraisablehook`, which is as it was when this context ends.
    """
    with _RESTORING:  # one thread at a time, so that each puts back what it found
        show = sys.unraisablehook

        def hook(unraisable: Any) -> None:
            if str(unraisable.exc_value) != "Event loop is closed":
                show(unraisable)

        sys.unraisablehook = hook
        try:
            yield
        except BaseException:
            time.sleep(LATE_READS)
            raise
        finally:
            sys.unraisablehook = show

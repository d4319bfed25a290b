"""The training state on disk, through Orbax: small, atomic, written while training goes on.

Orbax is slow to import, and whoever neither reads nor writes a state does without.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np


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
        _hush_closed_loops()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise ValueError(
                f"checkpoint {step} in MODEL_DIR cannot be restored ({str(error).splitlines()[0][:200]}): "
                "delete that step's folder, or set another MODEL_DIR"
            ) from None

    def wait(self) -> None:
        """Returns once all that was saved is on disk."""
        if "_manager" in vars(self):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        if "_manager" in vars(self):
            self._manager.close()


def _hush_closed_loops() -> None:
    """Orbax leaves a failed restore's other reads running; each would print that its event loop is closed."""
    show = sys.unraisablehook  # which tensorstore's threads print through

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = hook

"""Writes a trace of a few training steps, which TensorBoard's profile plugin, xprof and Perfetto open."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from prompt_tuning_jax.parallel.processes import is_writer

FOLDER = "profile"  # in MODEL_DIR
AfterStep = Callable[[Any], None]


@contextlib.contextmanager
def profiling(
    model_dir: str | os.PathLike | None, steps: int, say: Callable[[str], None] = lambda line: None
) -> Iterator[AfterStep]:
    """Traces `steps` steps into MODEL_DIR/profile, with whatever lies between them, such as an evaluation.

    The first step of the process is left out, because it includes the compilation. If the run ends earlier, the trace
    has as many steps as there were. Of several processes, process 0 writes a trace of its own devices.

    Args:
      model_dir: the run's folder; None for a run that writes nothing, which is not traced.
      steps: the number of steps to trace; 0 for no trace.
      say: called with a line if the run had too few steps left.

    Yields:
      A function that must be called after each step with the arrays that the step returns. Before and after the traced
      steps it waits for these arrays, so that the trace holds whole steps.
    """
    taken, tracing = 0, False

    def after_step(values: Any) -> None:
        nonlocal taken, tracing
        taken += 1
        if taken == 1 and steps and model_dir is not None and is_writer():
            jax.block_until_ready(values)
            jax.profiler.start_trace(Path(model_dir) / FOLDER)
            tracing = True
        elif tracing and taken == steps + 1:
            jax.block_until_ready(values)
            tracing = False
            jax.profiler.stop_trace()

    try:
        yield after_step
    finally:
        if tracing:
            jax.profiler.stop_trace()
        if taken <= steps and steps:
            say(f"the profile has {max(taken - 1, 0)} of {steps} steps, because the run had only {taken} steps left")

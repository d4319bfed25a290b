"""What a run reports of itself while it goes on, and the signal that ends it early."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from prompt_tuning_jax.command_line import TERMINATED
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.parallel.processes import is_writer, preempted
from prompt_tuning_jax.training.step import StepMetrics

Stop = Callable[[int], bool]  # whether to save and leave after a step


class Stopped(Exception):
    """Training was asked to stop, and all runs are saved: the same call goes on from there."""


class Window:
    """Holds the steps since the last record.

    A run checks the newest step's loss just before it adds the next one, so that it does not wait for the device.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._steps: list[tuple[int, np.ndarray, StepMetrics]] = []
        self._started = time.time()

    def add(self, step: int, ids: np.ndarray, metrics: StepMetrics) -> None:
        self._steps.append((step, ids, metrics))

    def check(self) -> None:
        """Raises ValueError where the newest step's loss or gradient is not finite."""
        if self._steps:
            step, ids, metrics = self._steps[-1]
            values = {"loss": metrics.sums.loss, "gradient's norm": metrics.gradient_norm}
            odd = [f"the {name} is {float(value)}" for name, value in values.items() if not np.isfinite(value)]
            if odd:
                raise SettingError(
                    f"{odd[0]} at step {step}, examples {ids.tolist()}: lower ",
                    Setting("learning_rate"),
                    ", or look at these examples; earlier checkpoints stand",
                )

    def close(self) -> dict[str, float]:
        """Means over the window, which starts anew."""
        self.check()
        steps = jax.device_get([metrics for _, _, metrics in self._steps])
        tokens = sum(float(metrics.sums.tokens) for metrics in steps)
        rows = sum(float(metrics.sums.rows) for metrics in steps)
        seconds = time.time() - self._started
        self.restart()
        return {
            "loss": sum(float(metrics.sums.loss) for metrics in steps) / tokens,
            "token_accuracy": 100 * sum(float(metrics.sums.correct) for metrics in steps) / tokens,
            "gradient_norm": float(np.mean([metrics.gradient_norm for metrics in steps])),
            "examples_per_second": rows / seconds,
        }


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[Stop]:
    """Lets SIGTERM end a command line's training: it saves, says so, and exits with `TERMINATED`.

    Before the first step there is nothing to save: it exits at once. After the last, it exits once the run is finished.
    With several processes all must save the same step: JAX takes the signal there, and agrees on a step.

    Yields:
      what `loop.train` asks after each step. With several processes, every process asks after each of its steps.
    """
    told, stepping = threading.Event(), threading.Event()

    def note(*_: object) -> None:
        told.set()
        if not stepping.is_set():
            sys.exit(TERMINATED)

    def stop(step: int) -> bool:
        stepping.set()
        return told.is_set() if alone else preempted(step)

    alone = jax.process_count() == 1
    before = signal.signal(signal.SIGTERM, note) if alone else None
    try:
        yield stop
    except Stopped as stopped:
        if is_writer():
            tqdm.write(str(stopped), file=sys.stderr)
        sys.exit(TERMINATED)
    finally:
        if alone:
            signal.signal(signal.SIGTERM, before)
    if told.is_set():
        sys.exit(TERMINATED)


def moved(injection: Injection, start: Injection) -> dict[str, float]:
    """Returns the mean norm of a prompt's positions, and how far the prompt has moved in units of its start's norm.

    Several prompts, per layer or per task, count as one.
    """
    prompt, before = (_positions(one) for one in (injection, start))
    if prompt is None or before is None:
        return {}
    found, start_norm = {"prompt_norm": float(jnp.mean(jnp.linalg.norm(prompt, axis=-1)))}, jnp.linalg.norm(before)
    if start_norm:  # a start of zeros has no unit
        found["prompt_moved"] = float(jnp.linalg.norm(prompt - before) / start_norm)
    return found


def _positions(injection: Injection) -> Any:
    """Returns the positions of whatever prompts there are; None if there are none."""
    if injection.task_prompts is not None:
        return jnp.stack([injection.task_prompts[task] for task in sorted(injection.task_prompts)])
    return injection.prompt if injection.prompt is not None else injection.layer_prompts

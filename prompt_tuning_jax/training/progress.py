"""Collects what a run reports while it trains, and handles the signal that ends it early."""

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
from jaxtyping import Array, Float
from tqdm import tqdm

from prompt_tuning_jax.command_line import TERMINATED
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.parallel.processes import is_writer, preempted
from prompt_tuning_jax.training.step import StepMetrics

Stop = Callable[[int], bool]  # returns whether to save and end after a step, given its number


class Stopped(Exception):
    """Raised when training was asked to stop and all runs are saved. The same call resumes them."""


class Window:
    """Collects the metrics of the steps since the last record.

    A run checks the newest step's loss just before it adds the next step. So the host does not wait for the device.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._steps: list[tuple[int, np.ndarray, StepMetrics, int]] = []
        self._started = time.time()

    def add(self, step: int, ids: np.ndarray, metrics: StepMetrics, flop: int) -> None:
        """Adds a step with its examples' ids, what it reported, and the FLOP of its matmuls."""
        self._steps.append((step, ids, metrics, flop))

    def check(self) -> None:
        """Raises ValueError if the newest step's loss or gradient norm is not finite."""
        if self._steps:
            step, ids, metrics, _ = self._steps[-1]
            values = {"loss": metrics.sums.loss, "gradient's norm": metrics.gradient_norm}
            invalid = [f"the {name} is {float(value)}" for name, value in values.items() if not np.isfinite(value)]
            if invalid:
                raise SettingError(
                    f"{invalid[0]} at step {step}, examples {ids.tolist()}: lower ",
                    Setting("learning_rate"),
                    ", or look at these examples; earlier checkpoints are unchanged",
                )

    def close(self) -> dict[str, float]:
        """Returns the means over the collected steps, and restarts the collection.

        Returns:
          "loss", in nats per target token, z-loss included; "token_accuracy", in per cent; "gradient_norm", the mean
          over the steps; "tflops_per_step", 1e-12 times the mean FLOP of a step's matmuls; and "examples_per_second".

        Raises:
          ValueError: the newest step's loss or gradient norm is not finite.
        """
        self.check()
        steps = jax.device_get([metrics for _, _, metrics, _ in self._steps])
        tokens = sum(float(metrics.sums.tokens) for metrics in steps)
        rows = sum(float(metrics.sums.rows) for metrics in steps)
        tflops = float(np.mean([flop for *_, flop in self._steps])) / 1e12
        seconds = time.time() - self._started
        self.restart()
        return {
            "loss": sum(float(metrics.sums.loss) for metrics in steps) / tokens,
            "token_accuracy": 100 * sum(float(metrics.sums.correct) for metrics in steps) / tokens,
            "gradient_norm": float(np.mean([metrics.gradient_norm for metrics in steps])),
            "tflops_per_step": tflops,
            "examples_per_second": rows / seconds,
        }


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[Stop]:
    """Makes SIGTERM end a command line's training: the run is saved, and the process exits with `TERMINATED`.

    A signal before the first step ends the process at once, because there is nothing to save. A signal during or after
    the last step ends it when the run is finished. Several processes must all save the same step, so JAX handles the
    signal and makes them agree on a step.

    Yields:
      the `stop` argument of `loop.train`. With several processes, each process must call it after each step.
    """
    terminated, stepping = threading.Event(), threading.Event()

    def note_signal(*_: object) -> None:
        terminated.set()
        if not stepping.is_set():
            sys.exit(TERMINATED)

    def stop(step: int) -> bool:
        stepping.set()
        return terminated.is_set() if single_process else preempted(step)

    single_process = jax.process_count() == 1
    before = signal.signal(signal.SIGTERM, note_signal) if single_process else None
    try:
        yield stop
    except Stopped as stopped:
        if is_writer():
            tqdm.write(str(stopped), file=sys.stderr)
        sys.exit(TERMINATED)
    finally:
        if single_process:
            signal.signal(signal.SIGTERM, before)
    if terminated.is_set():
        sys.exit(TERMINATED)


def prompt_norm_and_distance(injection: Injection, start: Injection) -> dict[str, float]:
    """Returns "prompt_norm", the mean norm of the prompt's positions, and "prompt_moved", its distance from the start.

    The distance is relative to the norm of the start, and is left out if the start is zero. Several prompts, per layer
    or per task, are treated as one array. The result is empty if there is no prompt.
    """
    prompt, before = (_positions(one) for one in (injection, start))
    if prompt is None or before is None:
        return {}
    norm, moved, start_norm = map(float, jax.device_get(_norms(prompt, before)))
    # No distance is relative to a start of zeros.
    return {"prompt_norm": norm} | ({"prompt_moved": moved / start_norm} if start_norm else {})


@jax.jit
def _norms(prompt: Float[Array, "..."], start: Float[Array, "..."]) -> tuple[Array, Array, Array]:
    norms = jnp.linalg.norm(prompt, axis=-1)
    return jnp.mean(norms), jnp.linalg.norm(prompt - start), jnp.linalg.norm(start)


def _positions(injection: Injection) -> Any:
    """Returns all prompt positions of an injection as one array; None if it has no prompt."""
    if injection.task_prompts is not None:
        return jnp.stack([injection.task_prompts[task] for task in sorted(injection.task_prompts)])
    return injection.prompt if injection.prompt is not None else injection.layer_prompts

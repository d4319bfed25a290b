"""Splits the wall time of a training program into parts: compiling, waiting for data, stepping and so on.

Nothing here waits for the device. Steps are dispatched asynchronously, so a step's time is counted where the loop next
blocks on its result, which is under stepping too: the loop reads the outstanding losses before it evaluates or saves.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator

import jax

PARTS = ("compiling", "waiting_for_data", "stepping", "evaluating", "saving", "other")


class WallTime:
    """Counts each second since it was made under one of `PARTS`.

    compiling is JAX's tracing, lowering and compilation in this thread, wherever it happens, and includes reading the
    cache of compiled programs. waiting_for_data is the time blocked on the next batch. saving includes writing the best
    prompt or model. other is the rest, such as loading the base model and the data.

    Runs that share a program share one WallTime: each of their summaries has the program's split until that run ended.
    """

    def __init__(self):
        _listen()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since, self._compiled = "other", time.perf_counter(), _compilation.seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside under `name`, and not under the part around it."""
        outer = self._part
        self._change(name)
        try:
            yield
        finally:
            self._change(outer)

    def _change(self, name: str) -> None:
        now, compiled = time.perf_counter(), _compilation.seconds - self._compiled
        self._seconds["compiling"] += compiled
        self._seconds[self._part] += now - self._since - compiled
        self._part, self._since, self._compiled = name, now, _compilation.seconds

    def split(self) -> dict[str, float]:
        """Returns the seconds of each part, their sum as total, and goodput: stepping / total."""
        self._change(self._part)
        total = sum(self._seconds.values())
        return {**self._seconds, "total": total, "goodput": self._seconds["stepping"] / total}


class _Compilation(threading.local):
    """The seconds that this thread has traced, lowered and compiled for, and the intervals that were counted."""

    def __init__(self):
        self.seconds = 0.0
        self.intervals: list[tuple[float, float]] = []  # (start, seconds)


_compilation = _Compilation()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_count_compilation)


def _count_compilation(event: str, seconds: float | int, **_: object) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    start, inner, intervals = time.perf_counter() - seconds, 0.0, _compilation.intervals
    # Tracing a function traces the functions in it, which have been reported already.
    while intervals and intervals[-1][0] >= start:
        inner += intervals.pop()[1]
    intervals.append((start, seconds))
    _compilation.seconds += max(seconds - inner, 0.0)

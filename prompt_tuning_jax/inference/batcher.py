"""Rows of many callers share batches: while some are computed the next ones gather (dynamic batching).

Everything here but the model's own work runs on the event loop.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prompt_tuning_jax.inference.requests import Request

SHARE = 8  # rows that a caller gets into a window before the next caller's turn
SMOOTHING = 0.2  # of the measured rate: what the latest window counts


class Overloaded(Exception):
    """More rows wait than may.

    Attributes:
      seconds: until those that wait now are answered, by the rate measured.
    """

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


class ModelError(Exception):
    """The model failed on a window of rows, or ended."""


class ModelThread:
    """The one thread that touches a predictor: its answers and the changes to its prompts take turns there."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "model")
        self._since: float | None = None

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` gives."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._timed, work, *arguments)

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self._since = time.monotonic()
        try:
            return work(*arguments)
        finally:
            self._since = None

    def busy(self) -> float:
        """Seconds that it has worked on what it is doing now."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Begins nothing more; what it is doing goes on."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Job:
    """A caller's requests.

    Attributes:
      answers: resolves to the answer to each, or to a `ModelError`.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self.answers: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self.arrived = time.monotonic()
        self.next = 0  # the first request that is in no window yet
        self._found: list[dict[str, Any]] = [{} for _ in requests]
        self._open = len(requests)

    def put(self, at: int, answer: dict[str, Any]) -> None:
        self._found[at] = answer
        self._open -= 1
        if not self._open and not self.answers.done():
            self.answers.set_result(self._found)


class Batcher:
    """Hands windows of the rows that wait to the model.

    Callers take turns, `SHARE` rows each, so that a large request delays a small one by a window at most.

    Attributes:
      waiting: rows in no window yet.
      rate: rows a second that the model computes; 0 before the first window.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], list[dict[str, Any]]],
        model: ModelThread,
        *,
        batch_size: int,
        window: int,
        wait: float,
        max_queue: int,
        observe: Callable[[int], None] = lambda rows: None,
    ):
        """Begins with `run`.

        Args:
          answer: the predictor's; runs on `model`.
          batch_size: rows for which nothing is waited for.
          window: rows handed over at once, which `answer` sorts into batches.
          wait: seconds that rows wait for more while the model has nothing to do.
          max_queue: rows that may wait.
          observe: is told the rows of each window.
        """
        self.waiting, self.rate = 0, 0.0
        self._answer, self._model, self._observe = answer, model, observe
        self._batch_size, self._window, self._wait, self._max_queue = batch_size, window, wait, max_queue
        self._jobs: deque[Job] = deque()
        self._arrived = asyncio.Event()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Puts requests into the queue.

        Raises:
          Overloaded: they do not fit.
        """
        if self.waiting + len(requests) > self._max_queue:
            raise Overloaded(
                f"{self.waiting} rows wait already, and {len(requests)} more would be over the limit of "
                f"{self._max_queue}: try again later",
                self.seconds(),
            )
        job = Job(requests)
        if requests:
            self._jobs.append(job)
            self.waiting += len(requests)
            self._arrived.set()
        else:
            job.answers.set_result([])
        return job

    def seconds(self) -> int:
        """How long the model will need for what waits."""
        return min(max(math.ceil(self.waiting / self.rate), 1), 3600) if self.rate else 1

    def cancel(self, job: Job) -> int:
        """Forgets what of a job is in no window yet: nobody waits for it. Returns how many rows those were."""
        job.answers.cancel()
        dropped = len(job.requests) - job.next
        if dropped and job in self._jobs:
            self._jobs.remove(job)
            self.waiting -= dropped
            job.next = len(job.requests)
        return dropped

    async def run(self) -> None:
        """Answers what comes, until it is cancelled; what waits then gets a `ModelError`."""
        try:
            while True:
                await self._arrived.wait()
                if self._jobs and self.waiting < self._batch_size:
                    await asyncio.sleep(self._jobs[0].arrived + self._wait - time.monotonic())
                window = self._take()
                if not self._jobs:
                    self._arrived.clear()
                if window:
                    await self._compute(window)
        finally:
            for job in self._jobs:
                self._fail(job, "the service is shutting down")

    def _take(self) -> list[tuple[Job, int]]:
        window: list[tuple[Job, int]] = []
        while self._jobs and len(window) < self._window:
            job = self._jobs.popleft()
            end = min(job.next + SHARE, len(job.requests), job.next + self._window - len(window))
            window += [(job, at) for at in range(job.next, end)]
            job.next = end
            if end < len(job.requests):
                self._jobs.append(job)
        self.waiting -= len(window)
        return window

    async def _compute(self, window: Sequence[tuple[Job, int]]) -> None:
        started = time.monotonic()
        try:
            answers = await self._model.run(self._answer, [job.requests[at] for job, at in window])
        except BaseException as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            for job in dict.fromkeys(job for job, _ in window):
                self._fail(job, f"the model failed ({why})")
                self.cancel(job)
            if not isinstance(error, Exception):
                raise
        else:
            for (job, at), answer in zip(window, answers, strict=True):
                job.put(at, answer)
            measured = len(window) / max(time.monotonic() - started, 1e-6)
            self.rate += (SMOOTHING if self.rate else 1.0) * (measured - self.rate)
            self._observe(len(window))

    @staticmethod
    def _fail(job: Job, why: str) -> None:
        if not job.answers.done():
            job.answers.set_exception(ModelError(why))

"""Puts rows of many callers into shared batches: while some rows are computed, the next ones queue (dynamic batching).

Everything in this module runs on the event loop, except the model's own work. Work is counted in tokens: the encoder
and decoder positions that a row takes. Rows whose program must be compiled first wait in a list of their own, so that
they do not delay the other rows.
"""

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prompt_tuning_jax.inference.requests import Request

SHARE = 8  # rows of one caller that enter a window before the next caller's turn
SMOOTHING = 0.2  # weight of the latest window in the moving average of the rate
# The budget of a window: PASS tokens, or the tokens that the model computes in PASS_SECONDS if these are more.
PASS, PASS_SECONDS = 4_096, 0.5

Rows = list[tuple["Job", int]]
Groups = tuple[list[list[int]], list[list[int]]]


class Overloaded(Exception):
    """Says that the queue has no room for more rows.

    Attributes:
      seconds: the estimated time until the rows that wait now are answered, from the measured rate.
    """

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


class ModelError(Exception):
    """Says that the model failed on a window of rows, or that the service is shutting down."""


class ModelThread:
    """Runs work on one thread, one call at a time; `busy` tells how long the current call has run."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "model")
        self._since: float | None = None

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Calls `work(*arguments)` on the thread, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._timed, work, *arguments)

    def _timed(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self._since = time.monotonic()
        try:
            return work(*arguments)
        finally:
            self._since = None

    def busy(self) -> float:
        """Returns for how many seconds the current call has run; 0 if there is none."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Starts no further call. The current call goes on to its end."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Job:
    """Holds the requests of one caller, and collects their answers.

    Attributes:
      answers: a future of the answers, one per request in order, or of a `ModelError`.
      costs: the number of tokens of each request.
    """

    def __init__(self, requests: Sequence[Request], costs: Sequence[int], deadline: asyncio.Timeout | None = None):
        """Starts with no answer.

        Args:
          deadline: the caller's timeout. It does not run while a request waits for a program to be compiled.
        """
        self.requests, self.costs = requests, costs
        self.answers: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self.arrived = time.monotonic()
        self.next = 0  # index of the first request that has entered no window yet
        self._answered: list[dict[str, Any]] = [{} for _ in requests]
        self._open = len(requests)
        self._deadline, self._left, self._compiling = deadline, 0.0, 0

    def put(self, index: int, answer: dict[str, Any]) -> None:
        self._answered[index] = answer
        self._open -= 1
        if not self._open and not self.answers.done():
            self.answers.set_result(self._answered)

    def compiling(self) -> bool:
        """Returns whether requests wait for a program to be compiled."""
        return self._compiling > 0

    def wait_for_program(self, requests: int) -> None:
        """Changes how many requests wait for a program. The deadline stops at the first one and goes on after the last.

        Args:
          requests: the number to add; negative for requests that wait no longer.
        """
        before, self._compiling = self._compiling, self._compiling + requests
        if self._deadline is None or self._deadline.expired() or self.answers.done():
            return
        now, when = asyncio.get_running_loop().time(), self._deadline.when()
        if not before and when is not None:
            self._left = when - now
            self._deadline.reschedule(None)
        elif not self._compiling:
            self._deadline.reschedule(now + self._left)


class Batcher:
    """Hands waiting rows to the model, one window of rows at a time.

    Callers take turns, `SHARE` rows each, so that a large request delays a small one by at most one window.

    Attributes:
      waiting: the number of rows that wait, which are not being computed yet.
      tokens: the number of tokens of these rows.
      rate: tokens that the model computes per second, a moving average; 0 before the first window.
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
        max_tokens: int = 2**62,
        cost: Callable[[Request], int] = lambda request: 1,
        groups: Callable[[Sequence[Request]], Groups] = lambda requests: ([[*range(len(requests))]], []),
        compiler: ModelThread | None = None,
        observe: Callable[[int], None] = lambda rows: None,
    ):
        """Starts nothing; `run` does.

        Args:
          answer: answers requests (`Predictor.answer`); it is called on the threads `model` and `compiler`.
          batch_size: if this many rows wait, they are computed without waiting for more.
          window: the largest number of rows handed over at once; `answer` sorts them into batches.
          wait: seconds that fewer rows wait for more while the model is idle.
          max_queue: the largest number of rows that may wait.
          max_tokens: the largest number of tokens that these rows may have.
          cost: returns the number of tokens of a request.
          groups: divides requests into batches whose programs are compiled and batches whose programs are not.
          compiler: the thread for batches whose programs are not compiled; `model` if None.
          observe: called with the number of rows each time rows have been computed.
        """
        self.waiting, self.tokens, self.rate = 0, 0, 0.0
        self._answer, self._model, self._compiler, self._observe = answer, model, compiler or model, observe
        self._batch_size, self._window, self._wait = batch_size, window, wait
        self._max_queue, self._max_tokens, self._cost, self._groups = max_queue, max_tokens, cost, groups
        self._open: set[Job] = set()
        self._jobs: deque[Job] = deque()
        self._uncompiled: Rows = []  # rows whose programs are not compiled
        self._ready: deque[Rows] = deque()  # batches that were in `_uncompiled`, whose programs are compiled now
        self._arrived, self._uncompiled_arrived = asyncio.Event(), asyncio.Event()

    def submit(self, requests: Sequence[Request], deadline: asyncio.Timeout | None = None) -> Job:
        """Adds requests to the queue, and returns their job. The caller must `cancel` the job in the end.

        Raises:
          Overloaded: the queue has no room for so many rows or tokens.
        """
        job = Job(requests, [*map(self._cost, requests)], deadline)
        tokens = sum(job.costs)
        for what, waiting, more, limit in (
            ("rows", self.waiting, len(requests), self._max_queue),
            ("tokens", self.tokens, tokens, self._max_tokens),
        ):
            if waiting + more > limit:
                raise Overloaded(
                    f"{waiting} {what} wait already, and {more} more would be over the limit of {limit}: try again "
                    "later",
                    self.seconds(),
                )
        if requests:
            self._open.add(job)
            self._jobs.append(job)
            self._count([(job, index) for index in range(len(requests))], 1)
            self._arrived.set()
        else:
            job.answers.set_result([])
        return job

    def seconds(self) -> int:
        """Returns the estimated seconds that the waiting rows take, 1 to 3600; 1 before the first window."""
        return min(max(math.ceil(self.tokens / self.rate), 1), 3600) if self.rate else 1

    def compiling(self) -> bool:
        """Returns whether requests of any caller wait for a program to be compiled."""
        return any(job.compiling() for job in self._open)

    def cancel(self, job: Job) -> int:
        """Removes the rows of a job that still wait, and returns their number."""
        job.answers.cancel()
        self._open.discard(job)
        dropped = [(job, index) for index in range(job.next, len(job.requests))]
        job.next = len(job.requests)
        if job in self._jobs:
            self._jobs.remove(job)
        for rows in (self._uncompiled, *self._ready):
            dropped += [row for row in rows if row[0] is job]
            rows[:] = [row for row in rows if row[0] is not job]
        self._count(dropped, -1)
        return len(dropped)

    async def run(self) -> None:
        """Answers rows until it is cancelled; jobs that are then unfinished fail with a `ModelError`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._run())
                tasks.create_task(self._run_uncompiled())
        finally:
            for job in self._open:
                self._fail(job, "the service is shutting down")

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._ready:
                await self._compute(self._stop_waiting(self._ready.popleft()), self._model)
            else:
                if self._jobs and self.waiting < self._batch_size:
                    await asyncio.sleep(self._jobs[0].arrived + self._wait - time.monotonic())
                await self._compute_window(self._take())
            if not self._jobs and not self._ready:
                self._arrived.clear()

    async def _compute_window(self, window: Rows) -> None:
        now, later = self._groups([job.requests[index] for job, index in window])
        for slot in itertools.chain(*later):
            job, index = window[slot]
            self._uncompiled.append((job, index))
            self._count([(job, index)], 1)
            job.wait_for_program(1)
            self._uncompiled_arrived.set()
        for slots in now:
            await self._compute([window[slot] for slot in slots], self._model)

    async def _run_uncompiled(self) -> None:
        """Answers rows whose programs are not compiled, one batch at a time.

        Rows whose program another batch has compiled in the meantime go back to the model.
        """
        while True:
            await self._uncompiled_arrived.wait()
            rows, self._uncompiled = self._uncompiled, []
            now, later = self._groups([job.requests[index] for job, index in rows])
            batches = [[rows[slot] for slot in slots] for slots in later]
            self._uncompiled = [*itertools.chain(*batches[1:])]
            for slots in now:
                self._ready.append([rows[slot] for slot in slots])
                self._arrived.set()
                for slot in slots:
                    rows[slot][0].wait_for_program(-1)
            if batches:
                batch = self._stop_waiting(batches[0])
                await self._compute(batch, self._compiler)
                for job, _ in batch:
                    job.wait_for_program(-1)
            if not self._uncompiled:
                self._uncompiled_arrived.clear()

    def _take(self) -> Rows:
        """Returns the rows of the next window; it may exceed its token budget by its last row."""
        window: Rows = []
        tokens, budget = 0, max(PASS, self.rate * PASS_SECONDS)
        while self._jobs and len(window) < self._window and tokens < budget:
            job = self._jobs.popleft()
            end = min(job.next + SHARE, len(job.requests), job.next + self._window - len(window))
            while job.next < end and tokens < budget:
                window.append((job, job.next))
                tokens += job.costs[job.next]
                job.next += 1
            if job.next < len(job.requests):
                self._jobs.append(job)
        return self._stop_waiting(window)

    def _stop_waiting(self, rows: Rows) -> Rows:
        """Stops counting rows as waiting, because they are computed next, and returns them."""
        self._count(rows, -1)
        return rows

    def _count(self, rows: Rows, sign: int) -> None:
        self.waiting += sign * len(rows)
        self.tokens += sign * sum(job.costs[index] for job, index in rows)

    async def _compute(self, rows: Rows, thread: ModelThread) -> None:
        if not rows:
            return
        started = time.monotonic()
        try:
            answers = await thread.run(self._answer, [job.requests[index] for job, index in rows])
        except BaseException as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            for job in dict.fromkeys(job for job, _ in rows):
                self._fail(job, f"the model failed ({why})")
                self.cancel(job)
            if not isinstance(error, Exception):
                raise
        else:
            for (job, index), answer in zip(rows, answers, strict=True):
                job.put(index, answer)
            if thread is self._model:
                tokens = sum(job.costs[index] for job, index in rows)
                measured = tokens / max(time.monotonic() - started, 1e-6)
                self.rate += (SMOOTHING if self.rate else 1.0) * (measured - self.rate)
            self._observe(len(rows))

    @staticmethod
    def _fail(job: Job, why: str) -> None:
        if not job.answers.done():
            job.answers.set_exception(ModelError(why))

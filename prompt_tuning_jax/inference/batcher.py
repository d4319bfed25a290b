"""Rows of many callers share batches: while some are computed the next ones gather (dynamic batching).

Everything here but the model's own work runs on the event loop. Work is counted in tokens, the positions of encoder and
decoder that a row takes. Rows whose program must be compiled first wait for that beside the others.
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

SHARE = 8  # rows that a caller gets into a window before the next caller's turn
SMOOTHING = 0.2  # of the measured rate: what the latest window counts
PASS, PASS_SECONDS = 4_096, 0.5  # a window has at most so many tokens, or what the model computes in so many seconds

Rows = list[tuple["Job", int]]
Groups = tuple[list[list[int]], list[list[int]]]


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
      costs: the tokens of each request.
    """

    def __init__(self, requests: Sequence[Request], costs: Sequence[int], deadline: asyncio.Timeout | None = None):
        """`deadline` is when the caller leaves: it stands still while requests wait for a program to be compiled."""
        self.requests, self.costs = requests, costs
        self.answers: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()
        self.arrived = time.monotonic()
        self.next = 0  # the first request that is in no window yet
        self._found: list[dict[str, Any]] = [{} for _ in requests]
        self._open = len(requests)
        self._deadline, self._left, self._compiling = deadline, 0.0, 0

    def put(self, at: int, answer: dict[str, Any]) -> None:
        self._found[at] = answer
        self._open -= 1
        if not self._open and not self.answers.done():
            self.answers.set_result(self._found)

    def compiling(self) -> bool:
        """Returns whether requests wait for a program to be compiled."""
        return self._compiling > 0

    def wait_for_program(self, requests: int) -> None:
        """Stops the deadline for so many requests more, or fewer."""
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
    """Hands windows of the rows that wait to the model.

    Callers take turns, `SHARE` rows each, so that a large request delays a small one by a window at most.

    Attributes:
      waiting: rows that nobody computes yet.
      tokens: how many these rows take.
      rate: tokens that the model computes per second; 0 before the first window.
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
        """Begins with `run`.

        Args:
          answer: the predictor's; runs on `model`, and on `compiler`.
          batch_size: rows for which nothing is waited for.
          window: rows handed over at once, which `answer` sorts into batches.
          wait: seconds that rows wait for more while the model has nothing to do.
          max_queue: rows that may wait.
          max_tokens: that these rows may take.
          cost: returns the tokens of a request.
          groups: divides requests into batches whose programs are compiled, and batches whose programs are not.
          compiler: the thread that answers the second kind.
          observe: is told the rows of each window.
        """
        self.waiting, self.tokens, self.rate = 0, 0, 0.0
        self._answer, self._model, self._compiler, self._observe = answer, model, compiler or model, observe
        self._batch_size, self._window, self._wait = batch_size, window, wait
        self._max_queue, self._max_tokens, self._cost, self._groups = max_queue, max_tokens, cost, groups
        self._open: set[Job] = set()
        self._jobs: deque[Job] = deque()
        self._aside: Rows = []  # their programs are not compiled
        self._ready: deque[Rows] = deque()  # batches from aside, whose programs are compiled now
        self._arrived, self._put_aside = asyncio.Event(), asyncio.Event()

    def submit(self, requests: Sequence[Request], deadline: asyncio.Timeout | None = None) -> Job:
        """Puts requests into the queue; whoever does must `cancel` the job in the end.

        Raises:
          Overloaded: they do not fit.
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
            self._count([(job, at) for at in range(len(requests))], 1)
            self._arrived.set()
        else:
            job.answers.set_result([])
        return job

    def seconds(self) -> int:
        """How long the model will need for what waits."""
        return min(max(math.ceil(self.tokens / self.rate), 1), 3600) if self.rate else 1

    def compiling(self) -> bool:
        """Returns whether requests of any caller wait for a program to be compiled."""
        return any(job.compiling() for job in self._open)

    def cancel(self, job: Job) -> int:
        """Forgets what of a job is not being computed: nobody waits for it. Returns how many rows those were."""
        job.answers.cancel()
        self._open.discard(job)
        dropped = [(job, at) for at in range(job.next, len(job.requests))]
        job.next = len(job.requests)
        if job in self._jobs:
            self._jobs.remove(job)
        for rows in (self._aside, *self._ready):
            dropped += [row for row in rows if row[0] is job]
            rows[:] = [row for row in rows if row[0] is not job]
        self._count(dropped, -1)
        return len(dropped)

    async def run(self) -> None:
        """Answers what comes, until it is cancelled; what waits then gets a `ModelError`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._run())
                tasks.create_task(self._run_aside())
        finally:
            for job in self._open:
                self._fail(job, "the service is shutting down")

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            if self._ready:
                await self._compute(self._begin(self._ready.popleft()), self._model)
            else:
                if self._jobs and self.waiting < self._batch_size:
                    await asyncio.sleep(self._jobs[0].arrived + self._wait - time.monotonic())
                await self._compute_window(self._take())
            if not self._jobs and not self._ready:
                self._arrived.clear()

    async def _compute_window(self, window: Rows) -> None:
        now, later = self._groups([job.requests[at] for job, at in window])
        for place in itertools.chain(*later):
            job, at = window[place]
            self._aside.append((job, at))
            self._count([(job, at)], 1)
            job.wait_for_program(1)
            self._put_aside.set()
        for places in now:
            await self._compute([window[place] for place in places], self._model)

    async def _run_aside(self) -> None:
        """Answers rows aside, a batch at a time, and hands back to the model those whose program is there by now."""
        while True:
            await self._put_aside.wait()
            rows, self._aside = self._aside, []
            now, later = self._groups([job.requests[at] for job, at in rows])
            batches = [[rows[place] for place in places] for places in later]
            self._aside = [*itertools.chain(*batches[1:])]
            for places in now:
                self._ready.append([rows[place] for place in places])
                self._arrived.set()
                for place in places:
                    rows[place][0].wait_for_program(-1)
            if batches:
                batch = self._begin(batches[0])
                await self._compute(batch, self._compiler)
                for job, _ in batch:
                    job.wait_for_program(-1)
            if not self._aside:
                self._put_aside.clear()

    def _take(self) -> Rows:
        """Returns the next window; its last request may be the first that is over the tokens of a window."""
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
        return self._begin(window)

    def _begin(self, rows: Rows) -> Rows:
        """Counts rows as waiting no more, since they are about to be computed."""
        self._count(rows, -1)
        return rows

    def _count(self, rows: Rows, sign: int) -> None:
        self.waiting += sign * len(rows)
        self.tokens += sign * sum(job.costs[at] for job, at in rows)

    async def _compute(self, rows: Rows, thread: ModelThread) -> None:
        if not rows:
            return
        started = time.monotonic()
        try:
            answers = await thread.run(self._answer, [job.requests[at] for job, at in rows])
        except BaseException as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            for job in dict.fromkeys(job for job, _ in rows):
                self._fail(job, f"the model failed ({why})")
                self.cancel(job)
            if not isinstance(error, Exception):
                raise
        else:
            for (job, at), answer in zip(rows, answers, strict=True):
                job.put(at, answer)
            if thread is self._model:
                tokens = sum(job.costs[at] for job, at in rows)
                measured = tokens / max(time.monotonic() - started, 1e-6)
                self.rate += (SMOOTHING if self.rate else 1.0) * (measured - self.rate)
            self._observe(len(rows))

    @staticmethod
    def _fail(job: Job, why: str) -> None:
        if not job.answers.done():
            job.answers.set_exception(ModelError(why))

"""Which task comes next: a fixed order of draws in which every task has its share from the first draw on."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int


class Mixing:
    """Draws of tasks by rate, as a function of seed and number.

    Draw j of task k, of share p, stands at time (j + u) / p, where u in [0, 1) is the task's by the seed; all draws are
    taken in the order of their times. Up to any time each task is within one draw of its share, which drawing at
    random is not, and how often a task was drawn before draw n is known without the draws before it.
    """

    def __init__(self, rates: Sequence[float], seed: int):
        """`rates` are positive, in any unit."""
        weights = np.asarray(rates, np.float64)
        self._share: Float[np.ndarray, " K"] = weights / weights.sum()
        self._offset: Float[np.ndarray, " K"] = np.random.default_rng([seed, 0x6D6978]).random(len(weights))

    def counts(self, number: int) -> Int[np.ndarray, " K"]:
        """How many of the first `number` draws are each task's; in time that does not grow with `number`."""
        time = number - len(self._share) - 1  # before it are fewer than `number` draws
        counts = np.maximum(np.ceil(time * self._share - self._offset), 0).astype(np.int64)
        for _ in range(number - int(counts.sum())):
            counts[self._next(counts)] += 1
        return counts

    def draws(self, start: int) -> Iterator[int]:
        """The task of draw `start`, `start + 1` and so on, without end."""
        counts = self.counts(start)
        while True:
            task = self._next(counts)
            counts[task] += 1
            yield task

    def _next(self, counts: Int[np.ndarray, " K"]) -> int:
        return int(np.argmin((counts + self._offset) / self._share))

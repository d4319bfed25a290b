"""Decides which task of a mixture is drawn next, so that each task keeps its share from the first draw on."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int


class Mixing:
    """Draws tasks in proportion to their rates, as a function of seed and draw number.

    Draw j of a task with share p has the time (j + u) / p, where u in [0, 1) is a random number of the task, from the
    seed. The draws are sorted by time. Unlike with random draws, at any time each task is within one draw of its share,
    and the number of its draws before draw n can be computed without making them.
    """

    def __init__(self, rates: Sequence[float], seed: int):
        """Takes the tasks' rates, which are positive and of any unit."""
        weights = np.asarray(rates, np.float64)
        self._share: Float[np.ndarray, " K"] = weights / weights.sum()
        self._offset: Float[np.ndarray, " K"] = np.random.default_rng([seed, 0x6D6978]).random(len(weights))

    def counts(self, number: int) -> Int[np.ndarray, " K"]:
        """Returns how often each task is in the first `number` draws, in time that does not grow with `number`."""
        time = number - len(self._share) - 1  # fewer than `number` draws are before this time
        counts = np.maximum(np.ceil(time * self._share - self._offset), 0).astype(np.int64)
        for _ in range(number - int(counts.sum())):
            counts[self._next(counts)] += 1
        return counts

    def draws(self, start: int) -> Iterator[int]:
        """Yields the task of draw `start`, `start + 1` and so on, without end."""
        counts = self.counts(start)
        while True:
            task = self._next(counts)
            counts[task] += 1
            yield task

    def _next(self, counts: Int[np.ndarray, " K"]) -> int:
        return int(np.argmin((counts + self._offset) / self._share))

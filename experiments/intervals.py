"""Computes bootstrap intervals of scores over seeds and rows."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.trials import ROWS

DRAWS = 10_000
Scores = Mapping[str, Sequence[float]]  # the scores of a setting's seeds, by task


class Interval(NamedTuple):
    """Holds a mean, and the range of the middle 95% of its bootstrap draws."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, draws: Float[np.ndarray, " D"]) -> "Interval":
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(float(mean), float(low), float(high))

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def bootstrap(values: Float[np.ndarray, "S N"], draws: int = DRAWS, seed: int = 0) -> Interval:
    """Returns the mean over seeds and rows, with a bootstrap interval: both are resampled with replacement.

    Args:
      values: a value per seed and row; all S seeds have the same N rows.
      draws: the number of bootstrap draws.
      seed: the seed of the draws.
    """
    of_seeds, of_rows = _shares(*values.shape, draws, seed)
    means = np.einsum("ds,sn,dn->d", of_seeds, values, of_rows, optimize=True)
    return Interval.of(values.mean(), means)


def draws_of(scores: Sequence[float], rows: int | None, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
    """Returns bootstrap draws of the mean over seeds of scores in per cent, if only the scores are known.

    Each draw resamples the seeds with replacement. For the rows, it adds the deviation of a binomial with the mean
    score's probability: one deviation for all seeds, because they are evaluated on the same rows.

    Args:
      scores: a score per seed; treated as an accuracy.
      rows: the number of rows that each seed is evaluated on; None to resample the seeds only.
      rng: makes the draws.
    """
    seeds = rng.choice(scores, (DRAWS, len(scores))).mean(axis=1)
    if rows is None:
        return seeds
    share = float(np.mean(scores)) / 100
    return seeds + 100 * (rng.binomial(rows, share, DRAWS) / rows - share)


def mean_of(scores: Scores) -> float:
    """Returns the mean over tasks of the means over seeds."""
    return float(np.mean([np.mean(seeds) for seeds in scores.values()]))


def mean_draws(scores: Scores, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
    """Returns bootstrap draws of `mean_of`, over the seeds and, for the ladder's tasks, over the rows."""
    return np.mean([draws_of(seeds, ROWS.get(task), rng) for task, seeds in scores.items()], axis=0)


@functools.lru_cache(maxsize=4)
def _shares(seeds: int, rows: int, draws: int, seed: int) -> tuple[Float[np.ndarray, "D S"], Float[np.ndarray, "D N"]]:
    """Returns how often each draw has each seed and each row, as shares. Drawing them takes most of the time."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    return of_seeds, rng.multinomial(rows, np.full(rows, 1 / rows), draws) / rows

"""Computes bootstrap intervals of scores over seeds and rows."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.trials import Result

DRAWS = 10_000
Scores = Mapping[str, Sequence[Result]]  # the trials of a setting, which differ in their seed, by task


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


def mean_of(scores: Scores) -> float:
    """Returns the mean over tasks of the means over seeds."""
    return float(np.mean([np.mean([seed.score or 0.0 for seed in seeds]) for seeds in scores.values()]))


def mean_draws(scores: Scores, rng: np.random.Generator | None) -> Float[np.ndarray, " D"]:
    """Returns bootstrap draws of `mean_of` over the seeds and over the rows, both resampled with replacement.

    A task's rows are the same in the draws of all settings, so a difference of two settings is over the same rows. Rows
    are not resampled if the answers to them are not known.

    Args:
      scores: the trials of each task, which differ in their seed.
      rng: resamples the seeds; None to keep each seed as it is.
    """
    means = []
    for seeds in scores.values():
        if all(seed.answers for seed in seeds):
            values = np.stack([_resampled(seed, row_draws(seed.targets)) for seed in seeds], axis=1)
        else:
            values = np.tile([seed.score or 0.0 for seed in seeds], (DRAWS, 1))
        count = len(seeds)
        shares = np.ones(count) if rng is None else rng.multinomial(count, np.full(count, 1 / count), DRAWS)
        means.append((values * shares).sum(axis=1) / count)
    return np.mean(means, axis=0)


def score_of(trial: Result) -> float:
    """Returns the score of a trial's answers, each row taken once."""
    return float(_resampled(trial, np.ones((1, len(trial.targets))))[0])


@functools.cache
def row_draws(targets: str) -> Float[np.ndarray, "D N"]:
    """Returns how often each draw has each row of the split with these targets. Another split has other draws."""
    rng, rows = np.random.default_rng(zlib.crc32(targets.encode())), len(targets)
    return rng.multinomial(rows, np.full(rows, 1 / rows), DRAWS).astype(np.float64)


def _resampled(trial: Result, counts: Float[np.ndarray, "D N"]) -> Float[np.ndarray, " D"]:
    """Returns a trial's score for each draw of its rows: the mean of its task's metrics, as `tasks.metrics` has them.

    Args:
      trial: has answers, and the metrics accuracy or mean_3class_f1 or both.
      counts: how often each draw has each row.
    """
    targets, answers = (np.array([*text]) for text in (trial.targets, trial.answers))

    def accuracy() -> Float[np.ndarray, " D"]:
        return counts @ (targets == answers) / counts.sum(axis=1)

    def mean_3class_f1() -> Float[np.ndarray, " D"]:
        of_classes = []
        for label in "012":
            wanted, found = targets == label, answers == label
            both, either = counts @ (wanted & found), counts @ wanted + counts @ found
            of_classes.append(np.divide(2 * both, either, out=np.zeros_like(either), where=either > 0))
        return np.mean(of_classes, axis=0)

    known = {"accuracy": accuracy, "mean_3class_f1": mean_3class_f1}
    names = dict.fromkeys(name.rpartition(" ")[2] for name in trial.metrics)  # "ranking accuracy" is an accuracy
    return 100 * np.mean([known[name]() for name in names], axis=0)


@functools.lru_cache(maxsize=4)
def _shares(seeds: int, rows: int, draws: int, seed: int) -> tuple[Float[np.ndarray, "D S"], Float[np.ndarray, "D N"]]:
    """Returns how often each draw has each seed and each row, as shares. Drawing them takes most of the time."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    return of_seeds, rng.multinomial(rows, np.full(rows, 1 / rows), draws) / rows

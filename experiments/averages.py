"""Computes means and standard deviations of trials' results over seeds and tasks, and writes them as tables."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.trials import Result, axes_in, value_order

MEAN = "mean"  # the value, in a mean, of the axis over which the mean was taken


class Spread(NamedTuple):
    """Holds a mean and the sample standard deviation, which is None for a single value or if it is not known."""

    mean: float
    std: float | None = None

    def __format__(self, spec: str) -> str:
        """Formats as "mean ± std"; `spec` is the number of decimals, by default 1."""
        digits = int(spec or 1)
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


class Average(NamedTuple):
    """Holds the average of trials that differ only in their seed.

    Attributes:
      axes: the trials' values by axis, without the axis of the seeds.
      n: the number of trials.
      score, ranking_score: None if a trial has no such score.
      metrics: the metrics that all trials have.
      note: says what is missing, or is empty.
    """

    axes: Mapping[str, str]
    n: int
    score: Spread | None
    ranking_score: Spread | None
    metrics: Mapping[str, Spread]
    note: str = ""


def spread(values: Sequence[float]) -> Spread:
    """Returns the mean and the sample standard deviation."""
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def group(results: Sequence[Result], seeds: str = "RANDOM_SEED") -> list[Average]:
    """Returns the averages over the seeds, in the order of the other axes.

    Args:
      results: the trials' results.
      seeds: the axis of the seeds.
    """
    return [average(axes, members) for axes, members in _grouped(results, (seeds,))]


def average(axes: Mapping[str, str], results: Sequence[Result], note: str = "") -> Average:
    """Returns the average of results that differ only by chance."""
    metrics = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
    return Average(
        axes,
        len(results),
        _spread_of([result.score for result in results]),
        _spread_of([result.ranking_score for result in results]),
        {name: spread([result.metrics[name] for result in results]) for name in metrics},
        note,
    )


def mean_over(results: Sequence[Result], axis: str = "TASK", seeds: str = "RANDOM_SEED") -> list[Average]:
    """Returns the means over an axis, in the order of the other axes: first per seed, then over the seeds.

    A seed counts only if it has results for every value of the axis that occurs in `results`. If seeds were left out,
    `note` says so. If all were left out, the average has n = 0 and no score. Results without the axis are ignored.
    """
    results = [result for result in results if axis in result.axes]
    every = sorted({result.axes[axis] for result in results}, key=value_order)
    averages = []
    for axes, members in _grouped(results, (axis, seeds)):
        by_seed = _grouped(members, (axis,))
        whole = [of_seed for _, of_seed in by_seed if {result.axes[axis] for result in of_seed} == set(every)]
        missing = [value for value in every if any(value not in _values(of_seed, axis) for _, of_seed in by_seed)]
        note = f"{len(whole)} of {len(by_seed)} are whole, missing {', '.join(missing)}" if missing else ""
        means = [
            of_seed[0]._replace(
                score=_mean_of([result.score for result in of_seed]),
                ranking_score=_mean_of([result.ranking_score for result in of_seed]),
                metrics={},
            )
            for of_seed in whole
        ]
        axes = {**axes, axis: MEAN}
        averages.append(average(axes, means, note) if means else Average(axes, 0, None, None, {}, note))
    return averages


def _grouped(results: Sequence[Result], without: Sequence[str]) -> list[tuple[dict[str, str], list[Result]]]:
    """Groups results that agree on all axes except `without`; returns each group with its values on these axes."""
    axes = axes_in(results)
    groups: dict[tuple[str | None, ...], list[Result]] = {}
    for result in results:
        key = tuple(None if axis in without else result.axes.get(axis) for axis in axes)
        groups.setdefault(key, []).append(result)
    return [
        ({axis: value for axis, value in zip(axes, key, strict=True) if value is not None}, groups[key])
        for key in sorted(groups, key=lambda key: [value_order(value) for value in key])
    ]


def _values(results: Sequence[Result], axis: str) -> set[str]:
    return {result.axes[axis] for result in results}


def _spread_of(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def to_markdown(averages: Sequence[Average], axes: Sequence[str]) -> str:
    """Returns a table of mean ± standard deviation.

    It has a column for each axis on which the averages differ. A line above the table has the values of the other axes.

    Args:
      averages: the rows.
      axes: the axes, in the order of their columns.
    """
    present = [axis for axis in axes if any(axis in average.axes for average in averages)]
    varying = [axis for axis in present if len({average.axes.get(axis) for average in averages}) > 1]
    fixed = [f"{axis} {averages[0].axes[axis]}" for axis in present if axis not in varying]
    ranked = any(average.ranking_score for average in averages)
    titles = [*varying, "n", "score", *(["ranking score"] if ranked else []), "metrics"]
    lines = [", ".join(fixed) + " in all.", ""] if fixed else []
    lines += [markdown_row(titles), markdown_row(["---"] * len(titles))]
    for one in averages:
        digits = 1 if one.score else 3  # losses are small numbers
        cells = [one.axes.get(axis, "") for axis in varying]
        cells += [str(one.n), f"{one.score:1}" if one.score else ""]
        cells += [f"{one.ranking_score:1}" if one.ranking_score else ""] if ranked else []
        metrics = "; ".join(f"{name} {value:{digits}}" for name, value in one.metrics.items())
        lines.append(markdown_row([*cells, one.note or metrics]))
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"

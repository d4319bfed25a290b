"""Rank classification as T5 has it: every choice is an example, scored by its log-likelihood. Plain NumPy.

`preprocessors.every_choice` makes the examples. A metric whose second argument is `scores` tells SeqIO's evaluators to
score the targets and not to generate.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from prompt_tuning_jax.tasks import metrics


class Choice(NamedTuple):
    """One choice of one example.

    Attributes:
      idx: the example's number and the choice's.
      length: tokens of the choice, end of sequence included; None where the example does not hold them.
    """

    idx: tuple[int, int]
    is_correct: bool
    length: int | None


def choice(score: Any, example: Mapping[str, Any], is_target: bool = False, **_) -> Any:
    """The choice that was scored, or a prediction's score as it is (T5 `rank_classification`)."""
    if not is_target:
        return score
    number, place = map(int, example["idx"])
    length = len(example["targets"]) if "targets" in example else None
    return Choice((number, place), bool(example["is_correct"]), length)


def rank_classification(
    targets: Sequence[Choice],
    scores: Sequence[float],
    *,
    num_classes: int | None = None,
    normalize_by_target_length: bool = False,
    prefix: str = "",
) -> dict[str, float]:
    """Metrics of the best-scored choices, under T5's names (t5/evaluation/metrics.py).

    Args:
      scores: log-likelihoods, one for each of `targets`, in any order of examples.
      num_classes: None where examples have different numbers of choices, of which several may be right: accuracy alone.
      normalize_by_target_length: divide each score by the choice's tokens.
      prefix: in front of the names.

    Returns:
      In per cent: "accuracy"; of two classes also "f1", "auc-roc" and "auc-pr" of class 1, of more the mean F1.

    Raises:
      ValueError: a length is missing, or an example has not `num_classes` choices.
    """
    if normalize_by_target_length and any(target.length is None for target in targets):
        raise ValueError("scores cannot be divided by the targets' lengths: the examples do not hold their targets")
    rows = sorted(
        (target.idx, target.is_correct, score / (target.length or 1 if normalize_by_target_length else 1))
        for target, score in zip(targets, scores, strict=True)
    )
    groups = [[*group] for _, group in itertools.groupby(rows, key=lambda row: row[0][0])]
    best = [max(group, key=lambda row: row[2]) for group in groups]  # the first of equals, as argmax
    values = {"accuracy": metrics.mean_in_per_cent([right for _, right, _ in best])}
    several = any(sum(right for _, right, _ in group) > 1 for group in groups)
    if num_classes and not several:
        if any(len(group) != num_classes for group in groups):
            raise ValueError(f"expected {num_classes} choices of every example; use a split that holds them all")
        wanted = [max(range(num_classes), key=lambda place: group[place][1]) for group in groups]
        found = [row[0][1] for row in best]
        if num_classes > 2:
            values |= metrics.mean_f1(wanted, found, classes=num_classes)
        else:
            lead = np.array([group[1][2] - group[0][2] for group in groups], np.float64)
            positive = np.array(wanted, np.bool_)
            values |= metrics.f1(wanted, found)
            values |= {"auc-roc": 100.0 * auc_roc(positive, lead), "auc-pr": 100.0 * average_precision(positive, lead)}
    return {f"{prefix}{name}": value for name, value in values.items()}


def auc_roc(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    """The share of pairs of a positive and a negative in which the positive scores higher, equals counting half.

    0 where there is no such pair.
    """
    high, low = score[positive], np.sort(score[~positive])
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / (2 * len(high) * len(low))) if len(high) and len(low) else 0.0


def average_precision(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    """The precision at each threshold, weighted by the recall it adds; 0 where nothing is positive."""
    if not positive.any():
        return 0.0
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # equals stand or fall together
    right = np.cumsum(positive[order])[last]
    seen = (np.arange(len(score)) + 1)[last]
    return float(np.sum(np.diff(right, prepend=0) / positive.sum() * right / seen))

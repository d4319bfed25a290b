"""Computes T5's rank classification, in which each choice is an example that is scored by its log-likelihood.

`preprocessors.every_choice` makes the examples. SeqIO's evaluators score the targets, instead of generating, if the
second argument of a metric is named `scores`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from prompt_tuning_jax.tasks import metrics


class Choice(NamedTuple):
    """Holds one choice of one example.

    Attributes:
      idx: the index of the example, and the index of the choice.
      is_correct: whether the choice is a correct answer.
      length: the number of tokens of the choice, including the end of sequence; None if the example has no tokens.
    """

    idx: tuple[int, int]
    is_correct: bool
    length: int | None


def choice(score: Any, example: Mapping[str, Any], is_target: bool = False, **_) -> Any:
    """Returns the choice for a target, and the unchanged score for a prediction (T5 `rank_classification`)."""
    if not is_target:
        return score
    number, index = map(int, example["idx"])
    length = len(example["targets"]) if "targets" in example else None
    return Choice((number, index), bool(example["is_correct"]), length)


def rank_classification(
    targets: Sequence[Choice],
    scores: Sequence[float],
    *,
    num_classes: int | None = None,
    normalize_by_target_length: bool = False,
    prefix: str = "",
) -> dict[str, float]:
    """Returns the metrics of the choices with the best scores, under T5's names (t5/evaluation/metrics.py).

    Args:
      targets: the choices, in any order.
      scores: log-likelihoods, one per target.
      num_classes: the number of choices per example. None if it differs between examples; only the accuracy is then
        returned, as it is if an example has several correct choices.
      normalize_by_target_length: whether to divide each score by the choice's number of tokens.
      prefix: a prefix of the metrics' names.

    Returns:
      The metrics in per cent: "accuracy"; with two classes also "f1", "auc-roc" and "auc-pr" of class 1; with more
      classes also the mean F1.

    Raises:
      ValueError: a length is missing, or an example does not have `num_classes` choices.
    """
    if normalize_by_target_length and any(target.length is None for target in targets):
        raise ValueError("scores cannot be divided by the targets' lengths: the examples do not hold their targets")
    rows = sorted(
        (target.idx, target.is_correct, score / (target.length or 1 if normalize_by_target_length else 1))
        for target, score in zip(targets, scores, strict=True)
    )
    groups = [[*group] for _, group in itertools.groupby(rows, key=lambda row: row[0][0])]
    best = [max(group, key=lambda row: row[2]) for group in groups]  # like argmax, it takes the first of equal scores
    values = {"accuracy": metrics.mean_in_per_cent([right for _, right, _ in best])}
    several = any(sum(right for _, right, _ in group) > 1 for group in groups)
    if num_classes and not several:
        if any(len(group) != num_classes for group in groups):
            raise ValueError(f"expected {num_classes} choices of every example; use a split that holds them all")
        wanted = [max(range(num_classes), key=lambda index: group[index][1]) for group in groups]
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
    """Returns the fraction of positive-negative pairs in which the positive has the higher score; ties count half.

    It is 0 if there is no such pair.
    """
    high, low = score[positive], np.sort(score[~positive])
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / (2 * len(high) * len(low))) if len(high) and len(low) else 0.0


def average_precision(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float:
    """Returns the mean of the precision at each threshold, weighted by the added recall; 0 without positives."""
    if not positive.any():
        return 0.0
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)  # equal scores share a threshold
    right = np.cumsum(positive[order])[last]
    seen = (np.arange(len(score)) + 1)[last]
    return float(np.sum(np.diff(right, prepend=0) / positive.sum() * right / seen))

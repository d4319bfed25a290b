"""Computes the metrics of a whole split, in per cent, as the benchmarks define them, with NumPy only.

Each function takes the targets and the predictions that a postprocessor returned, in the same order. It returns its
values under T5's names (t5/evaluation/metrics.py). An answer that is not a label is -1 and never counts as correct.
Without examples every metric is 0, and so is a ratio with denominator 0; NaN is never returned. The functions are at
the top level of this module, so a cache can store their names.
"""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

NOT_METRICS = ("step", "split", "seconds")  # the fields of an evaluation's record that are not metrics


def accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Returns the percentage of predictions that equal their target."""
    return {"accuracy": mean_in_per_cent([t == p and p != -1 for t, p in zip(targets, predictions, strict=True)])}


def f1(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Returns the F1 of class 1 for classes 0 and 1. An answer that is neither counts as the wrong class."""
    wanted, found = _arrays(targets, predictions)
    found = np.where(np.isin(found, (0, 1)), found, 1 - wanted)
    return {"f1": _f1_of_class(wanted, found, 1)}


def mean_f1(targets: Sequence, predictions: Sequence, *, classes: int = 3) -> dict[str, float]:
    """Returns the unweighted mean of the F1 of each class (CB). A class without targets and predictions has F1 0."""
    wanted, found = _arrays(targets, predictions)
    mean = np.mean([_f1_of_class(wanted, found, label) for label in range(classes)])
    return {f"mean_{classes}class_f1": float(mean)}


def matthews(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Returns Matthews' correlation, with -1 as a class of its own (Gorodkin 2004, as in scikit-learn).

    It is 0 if the targets or the predictions are constant.
    """
    wanted, found = _arrays(targets, predictions)
    classes = np.union1d(wanted, found)
    counts = np.array([[np.sum(part == label) for label in classes] for part in (wanted, found)], np.float64)
    covariance = np.sum(wanted == found) * len(wanted) - counts[0] @ counts[1]
    variances = len(wanted) ** 2 - np.sum(counts**2, axis=1)
    return {"matthews_corrcoef": _ratio(100.0 * covariance, np.sqrt(variances[0] * variances[1]))}


def pearson(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Returns Pearson's correlation, or 0 if the targets or the predictions are constant."""
    return {"pearson_corrcoef": 100.0 * _correlation(*_arrays(targets, predictions))}


def spearman(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Returns Spearman's correlation: Pearson's of the ranks, where equal values have their mean rank.

    It is 0 if the targets or the predictions are constant.
    """
    ranks = map(_ranks, _arrays(targets, predictions))
    return {"spearman_corrcoef": 100.0 * _correlation(*ranks)}


def multirc_f1a(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """Returns the F1 over all answers of all questions (MultiRC's F1a), for values of `postprocessors.multirc`."""
    return f1(*_values(targets, predictions))


def multirc_em(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """Returns the percentage of questions with only correct predictions, for values of `postprocessors.multirc`.

    If a slice of a split has only some answers of a question, only these count.
    """
    right: dict[Any, bool] = {}
    for target, value, found in zip(targets, *_values(targets, predictions), strict=True):
        right[target["group"]] = right.get(target["group"], True) and value == found != -1
    return {"exact_match": mean_in_per_cent([*right.values()])}


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Returns SQuAD v1.1's exact match and F1 of words, each the best over a question's answers, as in its script.

    As in the script, a prediction that has only articles and punctuation gets an F1 of 0, even if it matches exactly.
    """
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        found = normalized(prediction)
        wanted = [normalized(answer) for answer in answers]
        exact.append(found in wanted)
        overlap.append(max((_word_f1(answer.split(), found.split()) for answer in wanted), default=0.0))
    return {"em": mean_in_per_cent(exact), "f1": mean_in_per_cent(overlap)}


def record(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """Returns SQuAD's exact match and F1 over ReCoRD's queries, for values of `postprocessors.record`.

    Each query occurs once per answer; its first prediction counts.
    """
    first: dict[Any, tuple[Sequence[str], str]] = {}
    for target, *pair in zip(targets, *_values(targets, predictions), strict=True):
        first.setdefault(target["group"], tuple(pair))
    return squad([answers for answers, _ in first.values()], [prediction for _, prediction in first.values()])


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum, without stemming, as T5 does.

    T5 instead reports the middle of a thousand random resamplings, which estimates this mean. " . " ends a sentence.

    Raises:
      ValueError: the package rouge-score is not installed.
    """
    try:
        from rouge_score import rouge_scorer  # slow to load (nltk), and only summarisation needs it
    except ModuleNotFoundError:
        raise ValueError("ROUGE needs the package rouge-score: pip install rouge-score") from None
    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = rouge_scorer.RougeScorer(names)
    pairs = [
        scorer.score(*(text.replace(" . ", " .\n") for text in pair)) for pair in zip(targets, predictions, strict=True)
    ]
    return {name: mean_in_per_cent([pair[name].fmeasure for pair in pairs]) for name in names}


def normalized(answer: str) -> str:
    """Normalises an answer as SQuAD does: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def task_score(metrics: Mapping[str, float]) -> float | None:
    """Returns a task's score, which is the mean of its metrics, or None if it has no metrics."""
    return float(np.mean([*metrics.values()])) if metrics else None


def suite_score(scores: Mapping[str, float | None]) -> float | None:
    """Returns a suite's score: the mean of its tasks' scores. Tasks without a score (diagnostics) are skipped."""
    known = [score for score in scores.values() if score is not None]
    return float(np.mean(known)) if known else None


def record_score(record: Mapping[str, Any]) -> float:
    """Returns the score by which the best step is chosen: the mean over tasks of the mean of each task's metrics.

    If no task has metrics, it is the negated mean of their losses.

    Args:
      record: an evaluation's record, as in metrics.jsonl. With several tasks, metrics are named "task/metric".
    """
    tasks: dict[str, dict[str, float]] = {}
    for name, value in record.items():
        if name not in NOT_METRICS:
            task, _, metric = name.rpartition("/")
            tasks.setdefault(task, {})[metric] = value
    scores = {task: task_score(metrics) for task, metrics in tasks.items() if "loss" not in metrics}
    if (mean := suite_score(scores)) is not None:
        return mean
    return -float(np.mean([metrics["loss"] for metrics in tasks.values()]))


def mean_in_per_cent(values: Sequence) -> float:
    """Returns the mean of values from 0 to 1 in per cent, rounded once: 23 of 40 give 57.5, not 57.49999999999999."""
    return 100.0 * float(np.sum(values)) / len(values) if len(values) else 0.0


def _arrays(targets: Sequence, predictions: Sequence) -> tuple[np.ndarray, np.ndarray]:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets, but {len(predictions)} predictions")
    return np.asarray(targets, np.float64), np.asarray(predictions, np.float64)


def _values(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> tuple[list, list]:
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets, but {len(predictions)} predictions")
    return [target["value"] for target in targets], [prediction["value"] for prediction in predictions]


def _ratio(part: float | np.number, whole: float | np.number) -> float:
    return float(part / whole) if whole else 0.0


def _f1_of_class(targets: Float[np.ndarray, " n"], predictions: Float[np.ndarray, " n"], label: int) -> float:
    """Returns the F1 of one class in per cent."""
    wanted, found = targets == label, predictions == label
    return _ratio(200.0 * np.sum(wanted & found), np.sum(wanted) + np.sum(found))


def _correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    # Compare the values themselves: a computed variance of a constant may differ from 0 by rounding.
    if any(len(part) == 0 or part.min() == part.max() for part in (one, other)):
        return 0.0
    one, other = (part / np.abs(part).max() for part in (one, other))  # an answer may be 1e300
    one, other = (part - part.mean() for part in (one, other))
    return float(np.clip(_ratio(one @ other, np.linalg.norm(one) * np.linalg.norm(other)), -1.0, 1.0))


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _word_f1(target: list[str], prediction: list[str]) -> float:
    same = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return _ratio(2.0 * same, float(len(target) + len(prediction)))

"""Metrics of a whole split, in per cent, as the benchmarks define them. Plain NumPy, so that a cache can name them.

Each takes the targets and the predictions that a postprocessor made, in the same order, and gives its values under the
names that T5 has for them (t5/evaluation/metrics.py). -1 stands for an answer that is no label, and is never right. Of
no examples every metric is 0, and so is a ratio whose denominator is 0; a value that is no number is never returned.
"""

import collections
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

NOT_METRICS = ("step", "split", "seconds")  # what else an evaluation's record holds


def accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Share of predictions that are the target."""
    return {"accuracy": mean_in_per_cent([t == p and p != -1 for t, p in zip(targets, predictions, strict=True)])}


def f1(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """F1 of class 1 of 0 and 1; an answer that is neither counts as the wrong one of the two."""
    wanted, found = _arrays(targets, predictions)
    found = np.where(np.isin(found, (0, 1)), found, 1 - wanted)
    return {"f1": _f1_of_class(wanted, found, 1)}


def mean_f1(targets: Sequence, predictions: Sequence, *, classes: int = 3) -> dict[str, float]:
    """The unweighted mean of each class's F1, which for a class in neither targets nor predictions is 0 (CB)."""
    wanted, found = _arrays(targets, predictions)
    mean = np.mean([_f1_of_class(wanted, found, label) for label in range(classes)])
    return {f"mean_{classes}class_f1": float(mean)}


def matthews(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Matthews' correlation; -1 is a class of its own (Gorodkin 2004, as in scikit-learn). Of a constant it is 0."""
    wanted, found = _arrays(targets, predictions)
    classes = np.union1d(wanted, found)
    counts = np.array([[np.sum(part == label) for label in classes] for part in (wanted, found)], np.float64)
    covariance = np.sum(wanted == found) * len(wanted) - counts[0] @ counts[1]
    variances = len(wanted) ** 2 - np.sum(counts**2, axis=1)
    return {"matthews_corrcoef": _ratio(100.0 * covariance, np.sqrt(variances[0] * variances[1]))}


def pearson(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Pearson's correlation. Of a constant, which tells nothing of the other, it is 0."""
    return {"pearson_corrcoef": 100.0 * _correlation(*_arrays(targets, predictions))}


def spearman(targets: Sequence, predictions: Sequence) -> dict[str, float]:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing their mean rank. Of a constant it is 0."""
    ranks = map(_ranks, _arrays(targets, predictions))
    return {"spearman_corrcoef": 100.0 * _correlation(*ranks)}


def multirc_f1a(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """F1 over all answers of all questions (MultiRC's F1a), of {"group", "value"} as `postprocessors.multirc` gives."""
    return f1(*_values(targets, predictions))


def multirc_em(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """Share of questions whose answers are all judged right. A slice that cuts a question counts what it has of it."""
    right: dict[Any, bool] = {}
    for target, value, found in zip(targets, *_values(targets, predictions), strict=True):
        right[target["group"]] = right.get(target["group"], True) and value == found != -1
    return {"exact_match": mean_in_per_cent([*right.values()])}


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD v1.1's exact match and F1 of words, each the best over a question's answers, as its script has them.

    The script gives an answer of nothing but articles and punctuation an F1 of 0, even where it matches exactly.
    """
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        found = normalized(prediction)
        wanted = [normalized(answer) for answer in answers]
        exact.append(found in wanted)
        overlap.append(max((_word_f1(answer.split(), found.split()) for answer in wanted), default=0.0))
    return {"em": mean_in_per_cent(exact), "f1": mean_in_per_cent(overlap)}


def record(targets: Sequence[Mapping], predictions: Sequence[Mapping]) -> dict[str, float]:
    """SQuAD's exact match and F1 over ReCoRD's queries, of {"group", "value"} as `postprocessors.record` gives.

    A query comes once for each of its answers; the first prediction for it counts.
    """
    first: dict[Any, tuple[Sequence[str], str]] = {}
    for target, *pair in zip(targets, *_values(targets, predictions), strict=True):
        first.setdefault(target["group"], tuple(pair))
    return squad([answers for answers, _ in first.values()], [prediction for _, prediction in first.values()])


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-Lsum, without stemming, as T5 has them.

    Their plain mean: T5 gives the middle of a thousand random resamplings, which estimates it. " . " ends a sentence.

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
    """SQuAD's: lower case, no punctuation, no articles, single blanks."""
    answer = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def task_score(metrics: Mapping[str, float]) -> float | None:
    """A task's score: the mean of its metrics; None where it has none."""
    return float(np.mean([*metrics.values()])) if metrics else None


def suite_score(scores: Mapping[str, float | None]) -> float | None:
    """A suite's score: the mean of its tasks' scores, those without one (diagnostics) left out."""
    known = [score for score in scores.values() if score is not None]
    return float(np.mean(known)) if known else None


def record_score(record: Mapping[str, Any]) -> float:
    """What the best step has most of: the mean over tasks of the mean of each one's metrics.

    Of tasks that have none, minus the mean of their losses.

    Args:
      record: of an evaluation, as in metrics.jsonl; of several tasks, metrics are called "task/metric".
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
    """The mean of shares from 0 to 1, rounded once: 57.5 of 23 in 40, where 100 * 0.575 is a bit less."""
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
    """In per cent."""
    wanted, found = targets == label, predictions == label
    return _ratio(200.0 * np.sum(wanted & found), np.sum(wanted) + np.sum(found))


def _correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    # Asked of the values themselves: rounding in the mean would give a constant some variance.
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

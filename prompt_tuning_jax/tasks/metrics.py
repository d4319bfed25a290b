"""Metrics of a whole split, in per cent, as T5 reports them. Plain NumPy, so that a cache can name them."""

from collections.abc import Sequence

import numpy as np


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Share of predictions that are the target; -1, an answer that is no label, is always wrong."""
    right = [t == p and p != -1 for t, p in zip(targets, predictions, strict=True)]
    return {"accuracy": 100.0 * float(np.mean(right))}

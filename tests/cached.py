"""Loads the examples of a cached split with a single task, and computes its metrics."""

from prompt_tuning_jax.batches.cache import load_tasks


def load_split(request, split, cache_dir=None):
    """Returns the examples of `split`, which a single task must have."""
    (part,) = load_tasks(request, split, cache_dir).values()
    return part.examples


def score(examples, predictions):
    """Returns the task's metrics of `predictions`: decoded texts, one per example, in order."""
    rows = [*zip(examples.fields, predictions, strict=True)]
    targets = [examples.postprocess(row["targets_pretokenized"], example=row, is_target=True) for row, _ in rows]
    found = [examples.postprocess(text, example=row, is_target=False) for row, text in rows]
    return {name: value for metric in examples.metrics for name, value in metric(targets, found).items()}

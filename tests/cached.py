"""What tests ask of a cached split: the examples of its one task, and the metrics of predictions."""

from prompt_tuning_jax.batches.cache import load_tasks


def load_split(request, split, cache_dir=None):
    """The examples of `split` of the one task that has it."""
    (part,) = load_tasks(request, split, cache_dir).values()
    return part.examples


def score(examples, predictions):
    """The task's metrics of decoded texts, one for each row in order."""
    rows = [*zip(examples.fields, predictions, strict=True)]
    targets = [examples.postprocess(row["targets_pretokenized"], example=row, is_target=True) for row, _ in rows]
    found = [examples.postprocess(text, example=row, is_target=False) for row, text in rows]
    return {name: value for metric in examples.metrics for name, value in metric(targets, found).items()}

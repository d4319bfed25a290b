"""Registers IMDB movie reviews: inputs are the unchanged review, targets `negative` or `positive` (as in recycling)."""

import functools
import random
from pathlib import Path

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import metrics, postprocessors, sources
from prompt_tuning_jax.tasks.register import FEATURES

LABELS = ("negative", "positive")


def _read(path: Path) -> list[sources.Row]:
    """Returns the rows in a fixed shuffled order, so that slices have both labels; the file is sorted by label."""
    rows = list(sources.read_jsonl(path, columns={"text": sources.text, "label": sources.label(2)}))
    random.Random(0).shuffle(rows)
    return rows


@seqio.map_over_dataset
def _to_text(row):
    return {"inputs": row["text"], "targets": tf.gather(list(LABELS), tf.cast(row["label"], tf.int32))}


seqio.TaskRegistry.add(
    "imdb_reviews_v100",
    source=sources.FilesOrTfds(
        "imdb_reviews/plain_text:1.0.0",
        {"train": "imdb_train.jsonl", "test": "imdb_test.jsonl"},
        _read,
        benchmark="imdb",
    ),
    preprocessors=[
        _to_text,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=FEATURES,
    postprocess_fn=functools.partial(postprocessors.label_index, labels=LABELS),
    metric_fns=[metrics.accuracy],
)

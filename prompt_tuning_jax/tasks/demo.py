"""Registers the demo's task: generated review sentences, with two validation splits (see `review_grammar`)."""

import functools

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors
from prompt_tuning_jax.tasks.register import FEATURES
from prompt_tuning_jax.tasks.review_grammar import LABELS, SPLIT_SIZES, sentences


def _rows(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed
    rows = sentences(split)
    columns = {"sentence": [row.text for row in rows], "label": [row.label for row in rows], "idx": [*range(len(rows))]}
    return tf.data.Dataset.from_tensor_slices(columns)


seqio.TaskRegistry.add(
    "demo_reviews",
    source=seqio.FunctionDataSource(_rows, splits=tuple(SPLIT_SIZES)),
    preprocessors=[
        preprocessors.label_text("demo", LABELS),
        preprocessors.remove_first_word,
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=FEATURES,
    postprocess_fn=functools.partial(postprocessors.label_index, labels=LABELS),
    metric_fns=[metrics.accuracy],
)

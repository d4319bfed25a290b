"""Registers pre-training on a folder of plain text: span corruption, and prefix LM for LM adaptation (section 2.2)."""

import functools
from collections.abc import Mapping

import seqio

from prompt_tuning_jax.tasks import preprocessors, sources
from prompt_tuning_jax.tasks.register import FEATURES

DENSITY, MEAN_SPAN = 0.15, 3.0

as_targets = functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"})


def corrupted_length(lengths: Mapping[str, int]) -> int:
    """Returns the number of tokens per example whose corrupted inputs fill TASK_FEATURE_LENGTHS."""
    return preprocessors.span_corruption_length(lengths["inputs"], DENSITY, MEAN_SPAN)


def both_lengths(lengths: Mapping[str, int]) -> int:
    """Returns the number of tokens that inputs and targets hold together, besides an end of sequence each."""
    return lengths["inputs"] + lengths["targets"] - 2


for _name, _length, _noise in (
    ("text_span_corruption", corrupted_length, preprocessors.span_corruption(DENSITY, MEAN_SPAN)),
    ("text_prefix_lm", both_lengths, preprocessors.prefix_lm()),
):
    seqio.TaskRegistry.add(
        _name,
        source=sources.TextFiles(),
        # There is no CacheDatasetPlaceholder, since it would change the seeds and so the embedded base model's
        # examples.
        preprocessors=[
            as_targets,
            seqio.preprocessors.tokenize,
            preprocessors.split_documents(_length),
            _noise,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        metric_fns=[],
    )

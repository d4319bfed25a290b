"""GLUE tasks under the official names (google-research/prompt-tuning data/glue.py)."""

import functools

import seqio

from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.features import FEATURES

SST2_LABELS = ("negative", "positive")

_sst2 = sources.FilesOrTfds(
    "glue/sst2:2.0.0",
    {"train": "SST-2/train.tsv", "validation": "SST-2/dev.tsv"},
    functools.partial(sources.read_tsv, columns={"sentence": sources.text, "label": sources.label(2)}),
)

for _prefix, _taskless in (("", []), ("taskless_", [preprocessors.remove_first_word])):
    seqio.TaskRegistry.add(
        f"{_prefix}glue_sst2_v200",
        source=_sst2,
        preprocessors=[
            preprocessors.label_text("sst2", SST2_LABELS),
            *_taskless,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        postprocess_fn=functools.partial(postprocessors.label_index, labels=SST2_LABELS),
        metric_fns=[metrics.accuracy],
    )

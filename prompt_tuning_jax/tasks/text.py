"""Pre-training on a folder of plain text: span corruption, and prefix LM for LM adaptation (section 2.2)."""

import functools

import seqio

from prompt_tuning_jax.tasks import preprocessors, sources
from prompt_tuning_jax.tasks.features import FEATURES

DENSITY, MEAN_SPAN = 0.15, 3.0


def _add(name: str, document_length, noise) -> None:
    """`document_length` gives the tokens of a document's piece from the feature lengths."""
    seqio.TaskRegistry.add(
        name,
        source=sources.TextFiles(),
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"}),
            seqio.preprocessors.tokenize,
            preprocessors.split_documents(document_length),
            noise,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=FEATURES,
        metric_fns=[],
    )


_add(
    "text_span_corruption",
    lambda lengths: preprocessors.span_corruption_length(lengths["inputs"], DENSITY, MEAN_SPAN),
    preprocessors.span_corruption(DENSITY, MEAN_SPAN),
)
# A piece is as long as inputs and targets together, an end of sequence each set aside.
_add("text_prefix_lm", lambda lengths: lengths["inputs"] + lengths["targets"] - 2, preprocessors.prefix_lm())

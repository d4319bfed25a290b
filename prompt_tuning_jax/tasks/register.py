"""Registers a task under all of its names, for three wordings of its inputs and three vocabularies.

    {"" | mt5_ | byt5_}{"" | taskless_ | task_index_}NAME{"" | _examples}

`taskless_` drops the task's name from the front of the inputs, as the paper's runs do. `task_index_` replaces it by the
sentinel of the task's number. The official `_examples` tasks differ only in what they log, so here they are the same.
A run replaces a task's vocabulary by that of its base model. The prefix (mt5_, byt5_) only matters if SeqIO is used
without a run: it says which vocabulary the task then has.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from prompt_tuning_jax.tasks import postprocessors, preprocessors
from prompt_tuning_jax.tokenizers.vocabulary import EXTRA_IDS

# The vocabularies of the public checkpoints. They are read only if a task is used without VOCABULARY.
T5_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000/sentencepiece.model"
MT5_VOCABULARY = "gs://t5-data/vocabs/mc4.250000.100extra/sentencepiece.model"


def _features(vocabulary: Any) -> dict[str, Any]:
    return {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}


FEATURES = _features(seqio.SentencePieceVocabulary(T5_VOCABULARY, extra_ids=EXTRA_IDS))
MODELS = {
    "": FEATURES,
    "mt5_": _features(seqio.SentencePieceVocabulary(MT5_VOCABULARY, extra_ids=0)),
    "byt5_": _features(seqio.ByteVocabulary()),
}
WORDINGS = ("", "taskless_", "task_index_")
SUFFIXES = ("", "_examples")


def add_task(
    name: str,
    source: seqio.DataSource,
    text_format: Sequence[Callable],
    *,
    postprocess: Callable | None = None,
    metrics: Sequence[Callable] = (),
    wordings: Sequence[str] = ("",),
    index: int | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    after_tokens: Sequence[Callable] = (),
) -> None:
    """Registers a task under all of its names.

    Args:
      name: the part of the official name between its prefixes and its suffix, such as "glue_sst2_v200".
      source: the source of the rows.
      text_format: preprocessors that turn a row into `inputs`, which start with the task's name, and `targets`.
      postprocess: a function of `postprocessors`, or a `functools.partial` of one with keyword arguments; None to keep
        the text unchanged.
      metrics: functions of `metrics`.
      wordings: the `WORDINGS` that the task has.
      index: the task's number, for `task_index_`.
      suffixes: the `SUFFIXES` that the task has.
      after_tokens: preprocessors of tokens that run after SeqIO's cache placeholder, so SeqIO never caches their
        result.
    """
    for model, wording, suffix in itertools.product(MODELS, wordings, suffixes):
        taskless = [preprocessors.remove_first_word] if wording else []
        numbered = [preprocessors.prepend_sentinel("inputs", index)] if wording == "task_index_" else []
        seqio.TaskRegistry.add(
            f"{model}{wording}{name}{suffix}",
            source=source,
            preprocessors=[
                *text_format,
                *taskless,
                seqio.preprocessors.tokenize,
                *numbered,
                seqio.CacheDatasetPlaceholder(),
                *after_tokens,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features=MODELS[model],
            postprocess_fn=postprocess,
            metric_fns=list(metrics),
        )


def add_mixture(
    name: str,
    rates: Mapping[str, float] | Sequence[str],
    *,
    wordings: Sequence[str] = ("",),
    suffixes: Sequence[str] = SUFFIXES,
) -> None:
    """Registers a mixture under all of its names.

    Args:
      name: the part of the name between its prefixes and its suffix, as in `add_task`.
      rates: the rates by the tasks' names, without prefixes and suffix; or only names, for equal rates.
      wordings: the `WORDINGS` that the mixture has.
      suffixes: the `SUFFIXES` that the mixture has.
    """
    rates = rates if isinstance(rates, Mapping) else dict.fromkeys(rates, 1.0)
    for model, wording, suffix in itertools.product(MODELS, wordings, suffixes):
        tasks = [(f"{model}{wording}{task}{suffix}", rate) for task, rate in rates.items()]
        seqio.MixtureRegistry.add(f"{model}{wording}{name}{suffix}", tasks)


def labelled(labels: Sequence[str], **options: Any) -> functools.partial:
    """Returns a postprocessor that turns an answer into its index in `labels`."""
    return functools.partial(postprocessors.label_index, labels=tuple(labels), **options)

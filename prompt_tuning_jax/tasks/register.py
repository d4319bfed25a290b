"""How a task gets its names: three wordings of its inputs, three vocabularies, one definition.

    {"" | mt5_ | byt5_}{"" | taskless_ | task_index_}NAME{"" | _examples}

`taskless_` drops the task's name from the front of the inputs, as the paper's runs do; `task_index_` puts the sentinel
of the task's number in its place. The official `_examples` tasks differ only in what they log, and are the same here.
A run replaces the vocabulary by that of its base; the prefix says which one a task has when SeqIO is asked alone.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio

from prompt_tuning_jax.tasks import postprocessors, preprocessors
from prompt_tuning_jax.tokenizers.vocabulary import EXTRA_IDS

# The vocabularies of the public checkpoints; they are read only when a task is used without VOCABULARY.
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
      name: what the official name has between its prefixes and its suffix, "glue_sst2_v200".
      text_format: preprocessors from a row to `inputs` and `targets`, the task's name in front of `inputs`.
      postprocess: a function of `postprocessors`, or `functools.partial` of one by keyword; None for the text as it is.
      metrics: functions of `metrics`.
      wordings: which of `WORDINGS` the task has.
      index: the task's number, for `task_index_`.
      suffixes: which of `SUFFIXES` the task has.
      after_tokens: preprocessors of tokens, after the point up to which a cache may hold them.
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
      name: as of a task.
      rates: of the tasks by name, prefixes and suffix left out; equal where only names are given.
    """
    rates = rates if isinstance(rates, Mapping) else dict.fromkeys(rates, 1.0)
    for model, wording, suffix in itertools.product(MODELS, wordings, suffixes):
        tasks = [(f"{model}{wording}{task}{suffix}", rate) for task, rate in rates.items()]
        seqio.MixtureRegistry.add(f"{model}{wording}{name}{suffix}", tasks)


def labelled(labels: Sequence[str], **options: Any) -> functools.partial:
    """The postprocessor of a task whose answers are `labels`: their places."""
    return functools.partial(postprocessors.label_index, labels=tuple(labels), **options)

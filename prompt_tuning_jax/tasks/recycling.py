"""Registers the tasks of prompt recycling (Lester et al. 2022).

They have other verbalizers, use a part of train for early stopping, and evaluate each split both by generation and by
rank classification. Their names contain the verbalizers, with `_spc_` for a space:
`pr:glue_qqp_v200_not_spc_duplicate_duplicate_...`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import seqio

from prompt_tuning_jax.tasks import (
    c4,
    glue,
    imdb,
    preprocessors,
    super_glue,  # noqa: F401  it registers ReCoRD, which a task below uses
)
from prompt_tuning_jax.tasks.derived import Splits, parts_of
from prompt_tuning_jax.tasks.rank_classification import choice, rank_classification
from prompt_tuning_jax.tasks.register import add_mixture, labelled
from prompt_tuning_jax.tasks.register import add_task as _add_task
from prompt_tuning_jax.tasks.text import as_targets

add_task = functools.partial(_add_task, suffixes=("",))

NORMED = functools.partial(rank_classification, normalize_by_target_length=True)


def add_family(
    name: str,
    ends: Sequence[str],
    source: seqio.DataSource,
    held_out: int,
    test: str,
    text_format: Sequence[Callable],
    choices: Sequence[Callable],
    postprocess: Callable,
    metrics: Sequence[Callable],
    rankings: Mapping[str, Sequence[Callable]],
) -> None:
    """Registers a training task, a test task and ranking tasks, and mixtures of all of them and of all but the first.

    Args:
      name: the start of the tasks' names, and the name of the mixture of all.
      ends: the suffixes of the names of the training task and the test task.
      source: the source of the rows.
      held_out: how many rows at the end of train are the validation split of the training task.
      test: the split of `source` that is the validation split of the other tasks.
      text_format: the text format of the training and test tasks.
      choices: the text format of the ranking tasks, with one example per choice.
      postprocess, metrics: those of the training and test tasks.
      rankings: the metrics of each ranking task, by the suffix of its name.
    """
    splits = {"train": f"train[:-{held_out}]", "validation": f"train[-{held_out}:]"}
    tests = {"validation": test}
    for end, its in zip(ends, (splits, tests), strict=True):
        add_task(f"{name}_{end}", Splits(source, its), text_format, postprocess=postprocess, metrics=metrics)
    for end, scores in rankings.items():
        add_task(f"{name}_{end}", Splits(source, tests), choices, postprocess=choice, metrics=scores)
    everything = [f"{name}_{end}" for end in (*ends, *rankings)]
    add_mixture(name, everything, suffixes=("",))
    add_mixture(f"{name}_eval", everything[1:], suffixes=("",))


def written(verbalizers: Sequence[str]) -> str:
    """Returns verbalizers in the form in which the tasks' names contain them."""
    return "_".join("_spc_".join(word.split()) for word in verbalizers)


_ranked = functools.partial(rank_classification, num_classes=2)
_ranked_normed = functools.partial(NORMED, num_classes=2)

_sst2 = parts_of("taskless_glue_sst2_v200")
add_family(
    "pr:glue_sst2_v200",
    ("train", "test"),
    _sst2.source,
    1_000,
    "validation",
    _sst2.text_format,
    [*_sst2.text_format, preprocessors.every_choice(glue.SST2_LABELS)],
    _sst2.postprocess,
    _sst2.metrics,
    {"test_rc": [_ranked]},
)

_imdb = parts_of("imdb_reviews_v100")
for _words in (("0", "1"), imdb.LABELS):
    _text = [preprocessors.plain_text(_words)]
    # Each digit is one token, so normalising by length changes nothing, but the official task reports it, too.
    _both = [_ranked, functools.partial(_ranked_normed, prefix="normed_")]
    add_family(
        f"pr:imdb_v100_{written(_words)}_verbalizers",
        ("train", "test"),
        _imdb.source,
        1_000,
        "test",
        _text,
        [*_text, preprocessors.every_choice(_words)],
        labelled(_words),
        _imdb.metrics,
        {"test_rc": _both if _words == ("0", "1") else [_ranked]},
    )

_qqp = parts_of("glue_qqp_v200")
for _words in (
    glue.CONFIGS["qqp"].labels,
    ("0", "1"),
    ("unique", "duplicate"),
    ("not duplicate", "duplicate"),
):
    _text = [preprocessors.label_text("qqp", _words), preprocessors.remove_first_word]
    add_family(
        f"pr:glue_qqp_v200_{written(_words)}_verbalizers",
        ("training", "test"),
        _qqp.source,
        10_000,
        "validation",
        _text,
        [*_text, preprocessors.every_choice(_words)],
        labelled(_words),
        _qqp.metrics,
        {"rc": [_ranked], "rc_normed": [_ranked_normed]},
    )

_record = parts_of("taskless_super_glue_record_v102")
add_family(
    "pr:super_glue_record_v102",
    ("training", "test"),
    _record.source,
    10_000,
    "validation",
    _record.text_format,
    [preprocessors.record_choices, preprocessors.remove_first_word],
    _record.postprocess,
    _record.metrics,
    {"rc": [rank_classification, functools.partial(NORMED, prefix="normed_")]},
)

# The control of prompt recycling: prompts that make a model answer with one of the labels for any input.
add_task(
    "c4_v220_random_positive_negative_targets",
    c4.official,
    [as_targets],
    after_tokens=[c4.inputs_pieces, preprocessors.prefix_and_random_label(("positive", "negative"))],
)

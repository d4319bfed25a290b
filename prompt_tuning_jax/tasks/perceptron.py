"""Registers tasks that compare losses over the labels with generation: BENCHMARK_NAME_VERSION_ and one of

    perceptron_train, perceptron_test                   all labels in one example: inputs and targets [T, C]
    generation_train, generation_test                   the usual form of a task
    rank_classification_validation, ..._test            one example per label, whose log-likelihood is the score

The `_train` tasks hold out some of the training rows as their validation split, which `rank_classification_validation`
shares. The `_test` tasks use the benchmark's own validation split.
"""

import dataclasses
import functools

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import glue, preprocessors, super_glue  # noqa: F401  they register the tasks used below
from prompt_tuning_jax.tasks.derived import Splits, parts_of, wrapped
from prompt_tuning_jax.tasks.rank_classification import choice, rank_classification
from prompt_tuning_jax.tasks.register import MODELS, add_mixture
from prompt_tuning_jax.tasks.register import add_task as _add_task
from prompt_tuning_jax.tasks.wrapped_postprocessors import of_choices

add_task = functools.partial(_add_task, suffixes=("",))

# How many training rows are held out.
HELD_OUT = {
    "glue_cola_v200": 500,
    "glue_sst2_v200": 2_000,
    "glue_mrpc_v200": 200,
    "glue_qqp_v200": 5_000,
    "glue_qnli_v200": 3_000,
    "glue_rte_v200": 200,
    "super_glue_boolq_v102": 400,
    "super_glue_cb_v102": 50,
    "super_glue_copa_v102": 50,
    "super_glue_rte_v102": 200,
    "super_glue_wic_v102": 400,
}
IS_CORRECT = seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.bool)

for _name, _count in HELD_OUT.items():
    _parts = parts_of(f"taskless_{_name}")
    _held_out, _test = {"validation": f"train[-{_count}:]"}, {"validation": "validation"}
    _split = {"train": f"train[:-{_count}]"} | _held_out

    for _end, _splits in (("train", _split), ("test", _test)):
        _source = Splits(_parts.source, _splits)
        add_task(
            f"{_name}_generation_{_end}",
            _source,
            _parts.text_format,
            postprocess=_parts.postprocess,
            metrics=_parts.metrics,
        )
        for _model, _features in MODELS.items():
            seqio.TaskRegistry.add(
                f"{_model}{_name}_perceptron_{_end}",
                source=_source,
                preprocessors=[
                    *_parts.text_format,
                    preprocessors.every_choice(_parts.labels, together=True),
                    seqio.preprocessors.tokenize,
                    seqio.preprocessors.append_eos_after_trim,
                    preprocessors.choices_last,
                ],
                output_features={key: dataclasses.replace(feature, rank=2) for key, feature in _features.items()}
                | {"is_correct": IS_CORRECT},
                postprocess_fn=wrapped(of_choices, _parts.postprocess),
                metric_fns=_parts.metrics,
            )

    for _end, _splits in (("validation", _held_out), ("test", _test)):
        add_task(
            f"{_name}_rank_classification_{_end}",
            Splits(_parts.source, _splits),
            [*_parts.text_format, preprocessors.every_choice(_parts.labels)],
            postprocess=choice,
            metrics=[functools.partial(rank_classification, num_classes=len(_parts.labels))],
        )

    for _loss, _ends in {
        "perceptron": ("perceptron_train", "perceptron_test"),
        "generation": (
            "generation_train",
            "generation_test",
            "rank_classification_validation",
            "rank_classification_test",
        ),
    }.items():
        add_mixture(f"{_name}_{_loss}", [f"{_name}_{_end}" for _end in _ends], suffixes=("",))

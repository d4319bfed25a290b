"""Registers SPoT's source tasks (Vu et al. 2022), with the task's name in the inputs."""

import functools

from prompt_tuning_jax.tasks import glue, metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.derived import Splits, parts_of
from prompt_tuning_jax.tasks.qa import IN_DOMAIN, mrqa_source
from prompt_tuning_jax.tasks.register import add_mixture, labelled
from prompt_tuning_jax.tasks.register import add_task as _add_task
from prompt_tuning_jax.tasks.summarization import SPLITS, generation_source

add_task = functools.partial(_add_task, suffixes=("",))

# GLUE's tasks are unchanged, except that MNLI is divided into three tasks.
for _name in ("cola", "sst2", "mrpc", "qqp", "stsb", "qnli", "rte", "wnli"):
    _parts = parts_of(f"glue_{_name}_v200")
    add_task(
        f"spot_glue_{_name}_v200",
        _parts.source,
        _parts.text_format,
        postprocess=_parts.postprocess,
        metrics=_parts.metrics,
    )
_MNLI = {
    "mnli_train": {"train": "train"},
    "mnli_validation_matched": {"validation": "validation_matched"},
    "mnli_validation_mismatched": {"validation": "validation_mismatched"},
}
for _name, _splits in _MNLI.items():
    _parts = parts_of("glue_mnli_v200")
    add_task(
        f"spot_glue_{_name}_v200",
        Splits(_parts.source, _splits),
        _parts.text_format,
        postprocess=_parts.postprocess,
        metrics=_parts.metrics,
    )
add_mixture("spot_glue_mnli_and_dev_v200", [f"spot_glue_{_name}_v200" for _name in _MNLI], suffixes=("",))

for _name in IN_DOMAIN:
    add_task(
        f"spot_mrqa_{_name}_v100",
        mrqa_source(_name),
        [preprocessors.question_text(_name)],
        postprocess=postprocessors.qa,
        metrics=[metrics.squad],
    )

_DOC_NLI = ("not_entailment", "entailment")
for _name, _tfds, _premise, _labels in (
    *((f"anli_r{n}_v010", f"anli/r{n}:0.1.0", "context", glue.NLI) for n in (1, 2, 3)),
    ("doc_nli_v100", "doc_nli:1.0.0", "premise", _DOC_NLI),
    ("snli_v110", "snli:1.1.0", "premise", glue.NLI),
):
    _read = functools.partial(
        sources.read_jsonl,
        columns={"hypothesis": sources.text, _premise: sources.text, "label": sources.label(len(_labels))},
    )
    add_task(
        f"spot_{_name}",
        sources.FilesOrTfds(_tfds, {split: f"{split}.jsonl" for split in SPLITS}, _read, benchmark=_name[:-5]),
        [preprocessors.pair_text(_name[:-5], "hypothesis", _premise, _labels)],
        postprocess=labelled(_labels),
        metrics=[metrics.accuracy],
    )

# The names have the versions that SPoT used. TFDS builds only newer versions of two of them.
for _name, _tfds, _document, _summary, _splits in (
    ("aeslc_v100", "aeslc:1.0.0", "email_body", "subject_line", SPLITS),
    ("billsum_v300", "billsum:3.0.0", "text", "summary", ("train", "test", "ca_test")),
    ("cnn_dailymail_v320", "cnn_dailymail:3.4.0", "article", "highlights", SPLITS),
    ("gigaword_v120", "gigaword:1.2.0", "document", "summary", SPLITS),
    ("multi_news_v100", "multi_news:2.1.0", "document", "summary", SPLITS),
    ("newsroom_v100", "newsroom:1.0.0", "text", "summary", SPLITS),
    ("samsum_v100", "samsum:1.0.0", "dialogue", "summary", SPLITS),
):
    add_task(
        f"spot_{_name}",
        generation_source(_tfds, _document, _summary, _splits),
        [preprocessors.summary_text(f"{_name[:-5]} summarize:", _document, _summary)],
        postprocess=postprocessors.text,
        metrics=[metrics.rouge],
    )

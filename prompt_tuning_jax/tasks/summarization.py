"""Registers summarisation, scored by ROUGE: XSum and CNN/DailyMail, from TFDS or from JSONL with TFDS's fields."""

import functools
from collections.abc import Sequence

from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.register import add_task

SPLITS = ("train", "validation", "test")


def generation_source(
    tfds_name: str, document: str, summary: str, splits: Sequence[str] = SPLITS
) -> sources.FilesOrTfds:
    """Returns a source of documents and summaries: TFDS, or `train.jsonl` and so on with the same two fields."""
    read = functools.partial(sources.read_jsonl, columns=dict.fromkeys((document, summary), sources.text))
    files = {split: f"{split}.jsonl" for split in splits}
    return sources.FilesOrTfds(tfds_name, files, read, benchmark=tfds_name.partition(":")[0])


for _task, _tfds, _document, _summary in (
    ("xsum_v110", "xsum:1.1.0", "document", "summary"),
    ("cnn_dailymail_v310", "cnn_dailymail:3.4.0", "article", "highlights"),  # TFDS no longer builds 3.1.0
):
    add_task(
        _task,
        generation_source(_tfds, _document, _summary),
        [preprocessors.summary_text("summarize:", _document, _summary)],
        postprocess=postprocessors.text,
        metrics=[metrics.rouge],
        suffixes=("_examples",),
    )

"""Registers SuperGLUE (Wang et al. 2019) and Definite Pronoun Resolution (DPR) under the official names.

Rows come from TFDS, or from SuperGLUE's own folders of JSONL files; rows of DPR only from TFDS. As in T5, WSC is a
generation task: it is trained on the rows whose candidate is the referent, and evaluated on all rows, by comparing the
generated text with the candidate.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import seqio

from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task, labelled

VERSION = "v102"
NO_YES = ("False", "True")
RTE_LABELS = ("entailment", "not_entailment")
CB_LABELS = ("entailment", "contradiction", "neutral")
WSC_NUMBER = 7

Check = Callable[[Any], Any]


def _texts(*names: str) -> dict[str, Check]:
    return dict.fromkeys(names, sources.text)


def flatten_multirc(line: sources.Row) -> Iterator[sources.Row]:
    """Yields a row per answer of each question of a paragraph, as in TFDS."""
    for question in line["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": line["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": line["idx"], "question": question["idx"], "answer": answer["idx"]},
            } | ({"label": answer["label"]} if "label" in answer else {})


def flatten_record(line: sources.Row) -> Iterator[sources.Row]:
    """Yields a row per query of a passage, as in TFDS: entities and answers are sorted and have no duplicates."""
    text = line["passage"]["text"]
    entities = {text[entity["start"] : entity["end"] + 1] for entity in line["passage"]["entities"]}
    for query in line["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": sorted(entities),
            "idx": {"passage": line["idx"], "query": query["idx"]},
        } | ({"answers": sorted({answer["text"] for answer in query["answers"]})} if "answers" in query else {})


def flatten_wsc(line: sources.Row) -> list[sources.Row]:
    """Returns the row with the spans as fields, corrected if they are not in the text (as in TFDS's `wsc.fixed`)."""
    row = line | line["target"]
    text = sources.text(row["text"])
    spans = ((f"{span}_text", sources.integer(row[f"{span}_index"])) for span in ("span1", "span2"))
    return [row | {name: _correct_span(text, sources.text(row[name]), index) for name, index in spans}]


def _correct_span(text: str, span: str, index: int) -> str:
    """Returns `span`, corrected if it is not in the text.

    The first letter gets the case of word `index` of the text, a full stop is removed, and a line break becomes a
    space.
    """
    if span in text:
        return span
    words = text.split()
    if not 0 <= index < len(words):
        raise ValueError(
            f"{span!r} is not in the text, and its index {index} is not that of a word, expected 0 .. {len(words) - 1}"
        )
    first = span[0].lower() if words[index][0].islower() else span[0].upper()
    mended = first + span[1:].rstrip(".").replace("\n", " ")
    return mended if mended in text else span


class Config(NamedTuple):
    """Describes one configuration of TFDS's `super_glue`.

    Attributes:
      text: the name that T5 writes in front of the inputs. A diagnostic set has the name and the number of the task
        that it belongs to.
      number: the task's number, for `task_index_`.
      folder: the folder of SuperGLUE's files.
      fields: the rows' fields other than the label or answers, each with its check.
      answer: the name of the field with the label or answers, and its check. Test files do not have this field.
      text_format: the preprocessors that turn a row into T5's text.
      postprocess, metrics: those of the task.
      flatten: turns a line's object into rows; None if it is a row.
      unanswered: the value of the field `answer` for rows of test files.
      tfds_name: the configuration's name in TFDS, if it is another.
      diagnostic: whether this is a diagnostic set, which only has a test split, with labels.
    """

    text: str
    number: int
    folder: str
    fields: dict[str, Check]
    answer: tuple[str, Check]
    text_format: Sequence[Callable]
    postprocess: Callable
    metrics: Sequence[Callable]
    flatten: Callable | None = None
    unanswered: Any = -1
    tfds_name: str | None = None
    diagnostic: bool = False

    def source(self, name: str, splits: Sequence[str] = ("train", "validation", "test")) -> sources.FilesOrTfds:
        """Returns the source of the rows of `splits`."""
        files = {"train": "train", "validation": "val", "test": self.folder if self.diagnostic else "test"}
        read = functools.partial(sources.read_jsonl, flatten=self.flatten)
        field, check = self.answer
        answered = functools.partial(read, columns=self.fields | {field: check})
        unanswered = functools.partial(read, columns=self.fields, constants={field: self.unanswered})
        return sources.FilesOrTfds(
            f"super_glue/{self.tfds_name or name}:1.0.2",
            {split: f"{self.folder}/{files[split]}.jsonl" for split in splits},
            answered,
            read_test=answered if self.diagnostic else unanswered,
            benchmark="super_glue",
        )


def _classification(
    text: str,
    number: int,
    folder: str,
    columns: Sequence[str],
    labels: Sequence[str],
    check: Check,
    scores: Sequence[Callable] = (metrics.accuracy,),
    **options: Any,
) -> Config:
    text_format = [preprocessors.label_text(text, labels, columns)]
    return Config(
        text, number, folder, _texts(*columns), ("label", check), text_format, labelled(labels), scores, **options
    )


_RTE = _classification(
    "rte", 5, "RTE", ("hypothesis", "premise"), RTE_LABELS, sources.label_name(RTE_LABELS)
)  # fmt: skip
_MULTIRC = _classification(
    "multirc", 3, "MultiRC", ("question", "answer", "paragraph"), NO_YES, sources.label(2),
    (metrics.multirc_f1a, metrics.multirc_em), flatten=flatten_multirc,
)  # fmt: skip
_RENAMED = {"premise": "sentence1", "hypothesis": "sentence2", "label": "label", "idx": "idx"}

CONFIGS = {
    "boolq": _classification("boolq", 0, "BoolQ", ("passage", "question"), NO_YES, sources.truth),
    "cb": _classification(
        "cb", 1, "CB", ("hypothesis", "premise"), CB_LABELS, sources.label_name(CB_LABELS),
        (metrics.mean_f1, metrics.accuracy),
    ),
    "copa": _classification(
        "copa", 2, "COPA", ("choice1", "choice2", "premise", "question"), ("choice1", "choice2"), sources.label(2)
    ),
    "multirc": _MULTIRC._replace(
        fields=_MULTIRC.fields | {"answer": sources.any_text},  # three answers of its training set are empty
        text_format=[*_MULTIRC.text_format, preprocessors.strip_markup],
        postprocess=functools.partial(postprocessors.multirc, labels=NO_YES),
    ),
    "record": Config(
        "record", 4, "ReCoRD",
        _texts("query", "passage") | {"entities": sources.texts},
        ("answers", sources.texts),
        [preprocessors.record_text],
        postprocessors.record,
        (metrics.record,),
        flatten=flatten_record,
        unanswered=[],
    ),
    "rte": _RTE,
    "wic": _classification("wic", 6, "WiC", ("sentence1", "sentence2", "word"), NO_YES, sources.truth),
    # SuperGLUE scores these two diagnostic sets by Matthews' correlation and by accuracy.
    "axb": _RTE._replace(
        folder="AX-b",
        fields=_texts("sentence1", "sentence2"),
        text_format=[functools.partial(seqio.preprocessors.rekey, key_map=_RENAMED), *_RTE.text_format],
        metrics=(metrics.matthews,),
        diagnostic=True,
    ),
    "axg": _RTE._replace(folder="AX-g", diagnostic=True),
}  # fmt: skip

_WSC = Config(
    "wsc:", WSC_NUMBER, "WSC",
    _texts("text", "span1_text", "span2_text") | dict.fromkeys(("span1_index", "span2_index"), sources.integer),
    ("label", sources.truth),
    [],
    postprocessors.wsc,
    (metrics.accuracy,),
    flatten=flatten_wsc,
    tfds_name="wsc.fixed",
)  # fmt: skip

for _name, _config in CONFIGS.items():
    add_task(
        f"super_glue_{_name}_{VERSION}",
        _config.source(_name, ("test",)) if _config.diagnostic else _config.source(_name),
        _config.text_format,
        postprocess=_config.postprocess,
        metrics=_config.metrics,
        wordings=WORDINGS,
        index=_config.number,
    )

for _end, _splits in (("train", ("train",)), ("eval", ("validation", "test"))):
    add_task(
        f"super_glue_wsc_{VERSION}_simple_{_end}",
        _WSC.source("wsc", _splits),
        [preprocessors.wsc_text(correct_only=_end == "train")],
        postprocess=_WSC.postprocess,
        metrics=_WSC.metrics,
        wordings=WORDINGS,
        index=WSC_NUMBER,
    )
add_mixture(
    f"super_glue_wsc_and_dev_{VERSION}_simple",
    [f"super_glue_wsc_{VERSION}_simple_{_end}" for _end in ("train", "eval")],
    wordings=WORDINGS,
)

add_task(
    "dpr_v001_simple",
    sources.FilesOrTfds("definite_pronoun_resolution:1.1.0", {"train": None, "test": None}),
    [preprocessors.pronoun_text],
    postprocess=postprocessors.text,
    metrics=[metrics.accuracy],
    wordings=WORDINGS,
    index=WSC_NUMBER,
)

# T5 mixes the tasks in proportion to their number of training examples.
EXAMPLES = {
    f"super_glue_{_name}_{VERSION}_examples": _count
    for _name, _count in {
        "boolq": 9_427,
        "cb": 250,
        "copa": 400,
        "multirc": 27_243,
        "record": 138_854,
        "rte": 2_490,
        "wic": 5_428,
    }.items()
} | {f"super_glue_wsc_{VERSION}_simple_train": 259, f"super_glue_wsc_{VERSION}_simple_eval_examples": 0}

for _name, _rates in {"": EXAMPLES, "_with_dpr": EXAMPLES | {"dpr_v001_simple_examples": 1_322}}.items():
    add_mixture(
        f"super_glue{_name}_{VERSION}_examples_proportional",
        {_task: float(_rate) for _task, _rate in _rates.items()},
        wordings=WORDINGS,
        suffixes=("",),
    )

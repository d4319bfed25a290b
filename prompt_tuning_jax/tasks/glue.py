"""Registers GLUE (Wang et al. 2019) under the official names, from TFDS or from GLUE's own folders of TSV files.

`glue_NAME_v002` and `glue_NAME_v200` are the same task. The first used glue:1.0.0, which TFDS no longer builds.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.register import WORDINGS, add_mixture, add_task, labelled

VERSIONS = ("v002", "v200")
SST2_LABELS = ("negative", "positive")
NLI = ("entailment", "neutral", "contradiction")
PAIR = {"sentence1": "sentence1", "sentence2": "sentence2"}


class Config(NamedTuple):
    """Describes one configuration of TFDS's `glue`.

    Attributes:
      text: the name that T5 writes in front of the inputs.
      number: the task's number, for `task_index_`; a diagnostic set has the number of the task that it belongs to.
      titles: the title of each field in GLUE's files.
      labels: the labels' names, in order; empty for STS-B, which has scores.
      label_title: the title of the label's column in GLUE's files.
      numbered: whether GLUE's files have a label's index; otherwise they have its name.
      metrics: the task's metrics.
      files: the file of each split.
      header: the columns' titles if the training and dev files have no header line, otherwise None.
      may_lack: whether the files have rows with too few cells or an empty text, as those of QQP do.
    """

    text: str
    number: int
    titles: dict[str, str]
    labels: tuple[str, ...]
    label_title: str
    numbered: bool
    metrics: tuple[Callable, ...]
    files: dict[str, str]
    header: Sequence[str] | None = None
    may_lack: bool = False

    def text_format(self) -> list[Callable]:
        """Returns the preprocessors that turn a row into T5's text."""
        if not self.labels:
            return [preprocessors.score_text(self.text, tuple(self.titles))]
        return [preprocessors.label_text(self.text, self.labels)]

    def postprocess(self, **options: Any) -> Callable:
        return labelled(self.labels, **options) if self.labels else postprocessors.number

    def source(self, name: str, splits: Sequence[str] | None = None) -> sources.FilesOrTfds:
        """Returns the source of the rows of `splits`, or of all splits."""
        texts = dict.fromkeys(self.titles, sources.any_text if self.may_lack else sources.text)
        if self.labels:
            check = sources.label(len(self.labels)) if self.numbered else sources.label_name(self.labels)
        else:
            check = sources.score(0.0, 5.0)
        read = functools.partial(sources.read_tsv, titles=self.titles | {"label": self.label_title})
        return sources.FilesOrTfds(
            f"glue/{name}:2.0.0",
            {split: file for split, file in self.files.items() if splits is None or split in splits},
            functools.partial(read, columns=texts | {"label": check}, header=self.header, skip_short=self.may_lack),
            read_test=functools.partial(read, columns=texts, constants={"label": -1 if self.labels else -1.0}),
            benchmark="glue",
        )


def _files(folder: str, end: str = "") -> dict[str, str]:
    return {split: f"{folder}/{file}{end}.tsv" for split, file in (("validation", "dev"), ("test", "test"))}


def _all_files(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.tsv"} | _files(folder)


_MATCHED, _MISMATCHED = _files("MNLI", "_matched"), _files("MNLI", "_mismatched")
_MNLI = Config(
    "mnli",
    1,
    {"hypothesis": "sentence2", "premise": "sentence1"},
    NLI,
    "gold_label",
    False,
    (metrics.accuracy,),
    {"train": "MNLI/train.tsv"}
    | {f"{split}_matched": file for split, file in _MATCHED.items()}
    | {f"{split}_mismatched": file for split, file in _MISMATCHED.items()},
)

CONFIGS = {
    "cola": Config(
        "cola",
        0,
        {"sentence": "sentence"},
        ("unacceptable", "acceptable"),
        "label",
        True,
        (metrics.matthews,),
        _all_files("CoLA"),
        header=("source", "label", "mark", "sentence"),
    ),
    "mnli": _MNLI,
    "mnli_matched": _MNLI._replace(files=_MATCHED),
    "mnli_mismatched": _MNLI._replace(files=_MISMATCHED),
    # Only GLUE's server has the labels of this set.
    "ax": _MNLI._replace(files={"test": "diagnostic/diagnostic.tsv"}, metrics=()),
    "mrpc": Config(
        "mrpc",
        2,
        {"sentence1": "#1 String", "sentence2": "#2 String"},
        ("not_equivalent", "equivalent"),
        "Quality",
        True,
        (metrics.f1, metrics.accuracy),
        _all_files("MRPC"),
    ),
    "qnli": Config(
        "qnli",
        3,
        {"question": "question", "sentence": "sentence"},
        ("entailment", "not_entailment"),
        "label",
        False,
        (metrics.accuracy,),
        _all_files("QNLI"),
    ),
    "qqp": Config(
        "qqp",
        4,
        {"question1": "question1", "question2": "question2"},
        ("not_duplicate", "duplicate"),
        "is_duplicate",
        True,
        (metrics.f1, metrics.accuracy),
        _all_files("QQP"),
        may_lack=True,
    ),
    "rte": Config(
        "rte", 5, PAIR, ("entailment", "not_entailment"), "label", False, (metrics.accuracy,), _all_files("RTE")
    ),
    "sst2": Config(
        "sst2", 6, {"sentence": "sentence"}, SST2_LABELS, "label", True, (metrics.accuracy,), _all_files("SST-2")
    ),
    "stsb": Config("stsb", 7, PAIR, (), "score", True, (metrics.pearson, metrics.spearman), _all_files("STS-B")),
    "wnli": Config(
        "wnli", 8, PAIR, ("not_entailment", "entailment"), "label", True, (metrics.accuracy,), _all_files("WNLI")
    ),
}

for _version in VERSIONS:
    for _name, _config in CONFIGS.items():
        add_task(
            f"glue_{_name}_{_version}",
            _config.source(_name),
            _config.text_format(),
            postprocess=_config.postprocess(),
            metrics=_config.metrics,
            wordings=WORDINGS,
            index=_config.number,
        )
    # TFDS's mnli has no split named validation. Together, these three have train and two validation splits.
    add_mixture(
        f"glue_mnli_and_dev_{_version}",
        [f"glue_{_name}_{_version}" for _name in ("mnli", "mnli_matched", "mnli_mismatched")],
        wordings=WORDINGS,
    )

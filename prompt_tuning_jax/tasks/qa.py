"""Registers reading comprehension: SQuAD, MRQA 2019, and transfer from SQuAD to other domains (table 1 of the paper).

MRQA has data sets in and out of domain.

DATA_DIR may contain SQuAD's JSON, MRQA's JSONL.gz in its folders `train` and `dev`, or JSONL with one question per
line; or, for a mixture of both, folders `squad` and `mrqa` with these files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks import metrics, postprocessors, preprocessors, sources
from prompt_tuning_jax.tasks.derived import Splits
from prompt_tuning_jax.tasks.register import add_mixture, add_task

# Maps each data set to the name of its file in MRQA, and of files with a subset of it in SQuAD's JSON (RobustQA).
OUT_OF_DOMAIN = {
    "bio_asq": ("BioASQ",),
    "drop": ("DROP",),
    "duo_rc": ("DuoRC.ParaphraseRC", "val_duorc"),
    "race": ("RACE", "val_race"),
    "relation_extraction": ("RelationExtraction", "val_relation_extraction"),
    "textbook_qa": ("TextbookQA",),
}
IN_DOMAIN = {
    "news_qa": "NewsQA",
    "trivia_qa": "TriviaQA-web",
    "search_qa": "SearchQA",
    "hotpot_qa": "HotpotQA",
    "natural_questions": "NaturalQuestionsShort",
    "squad": "SQuAD",
}


def read_questions(path: Path) -> Iterator[sources.Row]:
    """Yields each question of a file, which is SQuAD's JSON, MRQA's JSONL, or JSONL with one question per line.

    Yields:
      Rows {"id", "question", "context", "answers"}. A question without an id gets its index as the id.

    Raises:
      ValueError: a line is not JSON, or a question has no text or no answer; the message names the line or the
        question.
    """
    number = 0
    is_json = path.name.removesuffix(".gz").removesuffix(".xz").endswith(".json")
    lines = [(1, "".join(sources.read_lines(path)))] if is_json else sources.filled_lines(path)
    for line_number, line in lines:
        where = f"{path}, line {line_number}"
        try:
            for context, question in _questions(sources.read_json(line)):
                name = question.get("id", question.get("qid", number))
                where = f"{path}, line {line_number}, question {name!r}"
                answers = question["answers"] if "answers" in question else [question["answer"]]
                if not answers:
                    raise ValueError("no answer")
                row = {
                    "id": str(name),
                    "question": sources.text(question["question"]),
                    "context": sources.text(context),
                    "answers": [sources.text(a["text"] if isinstance(a, dict) else a) for a in answers],
                }
                yield row
                number += 1
        except KeyError as error:
            raise SettingError(f"{where}: no field {error}; expected SQuAD's or MRQA's; ", *sources.MEND) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingError(f"{where}: {error}; ", *sources.MEND) from None


def _questions(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the context and the fields of each question in a JSON object of any of the three formats."""
    if "header" in found:  # the first line of MRQA's files
        return
    articles = found.get("data", [{"paragraphs": [found]}])
    for passage in (passage for article in articles for passage in article["paragraphs"]):
        for question in passage.get("qas", [passage]):
            yield passage["context"], question


def as_squad(path: Path) -> Iterator[sources.Row]:
    """Yields rows in the form of TFDS's SQuAD."""
    for row in read_questions(path):
        yield row | {"answers": {"text": row["answers"]}}


def as_mrqa(path: Path) -> Iterator[sources.Row]:
    """Yields rows in the form of TFDS's MRQA, with only the fields that are used."""
    for row in read_questions(path):
        yield {"qid": row.pop("id")} | row


class QuestionFiles(sources.FilesOrTfds):
    """Source that reads a TFDS data set, or per split the first file under DATA_DIR that has one of several names."""

    def __init__(
        self,
        tfds_name: str,
        names: Mapping[str, Sequence[str]],
        read: Callable[[Path], Iterator[sources.Row]],
        **kwargs: Any,
    ):
        super().__init__(tfds_name, {split: first for split, (first, *_) in names.items()}, read, **kwargs)
        self._names = names

    def get_dataset(self, split="train", *args, **kwargs) -> tf.data.Dataset:
        there = (name for name in self._names[split] if _is_there(name, self._benchmark))
        self._files[split] = next(there, self._names[split][0])
        return super().get_dataset(split, *args, **kwargs)


def _is_there(name: str, benchmark: str | None) -> bool:
    folder = sources._data_dir
    try:
        return folder is not None and sources.find_file(folder, name, benchmark).is_file()
    except ValueError:
        return False


def mrqa_source(name: str) -> seqio.DataSource:
    """Returns the source of one of MRQA's data sets. Out-of-domain sets have only a validation split."""
    if name in IN_DOMAIN:
        file = f"{IN_DOMAIN[name]}.jsonl"
        files = {"train": (f"train/{file}",), "validation": (f"dev/{file}",)}
        return QuestionFiles(f"mrqa/{name}:1.0.0", files, as_mrqa, benchmark="mrqa")
    official, *subsets = OUT_OF_DOMAIN[name]
    names = (f"dev/{official}.jsonl", f"{official}.jsonl", *(f"{subset}.json" for subset in subsets))
    rows = QuestionFiles(f"mrqa/{name}:1.0.0", {"test": names}, as_mrqa, benchmark="mrqa")
    return Splits(rows, {"validation": "test"})  # TFDS calls this split test


squad = QuestionFiles(
    "squad/v1.1:3.0.0",
    {
        "train": ("train-v1.1.json", "train.jsonl", "train_partial.jsonl"),
        "validation": ("dev-v1.1.json", "dev.jsonl"),
    },
    as_squad,
    benchmark="squad",
)
SQUAD = "squad_v010_allanswers"
EXAMPLES = ("_examples",)
# Only SPoT has a task on MRQA's version of SQuAD.
MRQA = {name: f"mrqa_{name}_v100" for name in (*OUT_OF_DOMAIN, *IN_DOMAIN) if name != "squad"}
_SOURCES = {SQUAD: squad} | {task: mrqa_source(name) for name, task in MRQA.items()}

for _task, _source in _SOURCES.items():
    add_task(
        _task,
        _source,
        [preprocessors.question_text()],
        postprocess=postprocessors.qa,
        metrics=[metrics.squad],
        suffixes=EXAMPLES,
    )

for _name in OUT_OF_DOMAIN:
    add_mixture(f"squad_to_{_name}", [SQUAD, MRQA[_name]], suffixes=EXAMPLES)
add_mixture("squad_to_mrqa", [SQUAD, *(MRQA[_name] for _name in OUT_OF_DOMAIN)], suffixes=EXAMPLES)

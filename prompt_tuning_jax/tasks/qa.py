"""Reading comprehension: SQuAD, MRQA 2019 in and out of domain, and SQuAD to other domains (table 1 of the paper).

DATA_DIR may hold SQuAD's JSON, MRQA's JSONL.gz in its folders `train` and `dev`, or JSONL of one question a line; or
folders `squad` and `mrqa` of these, for a mixture of both.
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

# Each set's file in MRQA, and what subsets of it in SQuAD's JSON are called (RobustQA).
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
    """Every question of a file: SQuAD's JSON, MRQA's JSONL, or JSONL of one question a line.

    Returns:
      Rows {"id", "question", "context", "answers"}. A question without an id has its number.

    Raises:
      ValueError: a line is no JSON, or a question has no text or no answer; it names the line or the question.
    """
    number = 0
    whole = path.name.removesuffix(".gz").removesuffix(".xz").endswith(".json")
    lines = [(1, "".join(sources.read_lines(path)))] if whole else sources.filled_lines(path)
    for at, line in lines:
        place = f"{path}, line {at}"
        try:
            for context, question in _questions(sources.read_json(line)):
                name = question.get("id", question.get("qid", number))
                place = f"{path}, line {at}, question {name!r}"
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
            raise SettingError(f"{place}: no field {error}; expected SQuAD's or MRQA's; ", *sources.MEND) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingError(f"{place}: {error}; ", *sources.MEND) from None


def _questions(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The context and the question of each question in a JSON object of any of the three formats."""
    if "header" in found:  # the first line of MRQA's files
        return
    articles = found.get("data", [{"paragraphs": [found]}])
    for passage in (passage for article in articles for passage in article["paragraphs"]):
        for question in passage.get("qas", [passage]):
            yield passage["context"], question


def as_squad(path: Path) -> Iterator[sources.Row]:
    """Rows as TFDS has SQuAD's."""
    for row in read_questions(path):
        yield row | {"answers": {"text": row["answers"]}}


def as_mrqa(path: Path) -> Iterator[sources.Row]:
    """Rows as TFDS has MRQA's, of the fields that are used."""
    for row in read_questions(path):
        yield {"qid": row.pop("id")} | row


class QuestionFiles(sources.FilesOrTfds):
    """A TFDS set, or for each split the first file under DATA_DIR that has one of several names."""

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
    """The rows of one of MRQA's sets; those out of domain have validation rows alone."""
    if name in IN_DOMAIN:
        file = f"{IN_DOMAIN[name]}.jsonl"
        files = {"train": (f"train/{file}",), "validation": (f"dev/{file}",)}
        return QuestionFiles(f"mrqa/{name}:1.0.0", files, as_mrqa, benchmark="mrqa")
    official, *subsets = OUT_OF_DOMAIN[name]
    names = (f"dev/{official}.jsonl", f"{official}.jsonl", *(f"{subset}.json" for subset in subsets))
    rows = QuestionFiles(f"mrqa/{name}:1.0.0", {"test": names}, as_mrqa, benchmark="mrqa")
    return Splits(rows, {"validation": "test"})  # as TFDS calls them


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
# MRQA's own SQuAD is a task of SPoT's alone.
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

"""SQuAD and MRQA: three file formats, T5's padded texts, real rows, and what is wrong in a file."""

import functools
import gzip
import itertools
import json
import lzma
import re
import string

import pytest
import seqio
from task_rows import register, texts

from prompt_tuning_jax.tasks import qa, sources

register("qa", "spot")

CONTEXT = "Rome fell (in 476). [PAR] x"
QUESTIONS = [("a1", "When did Rome fall?", ["476", "in 476"]), ("a2", "What fell?", ["Rome"])]
SQUAD_JSON = {
    "version": "1.1",
    "data": [
        {
            "title": "Rome",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {"id": i, "question": q, "answers": [{"text": a, "answer_start": 0} for a in answers]}
                        for i, q, answers in QUESTIONS
                    ],
                }
            ],
        }
    ],
}
MRQA_LINES = [
    {"header": {"dataset": "DROP", "split": "dev"}},
    {
        "id": "p",
        "context": CONTEXT,
        "qas": [
            {"qid": i, "question": q, "answers": answers, "detected_answers": [{"text": "no", "char_spans": [[0, 1]]}]}
            for i, q, answers in QUESTIONS
        ],
        "context_tokens": [["Rome", 0]],
    },
]
FLAT_LINES = [{"id": i, "context": CONTEXT, "question": q, "answers": answers} for i, q, answers in QUESTIONS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES = {
    "train-v1.1.json": json.dumps(SQUAD_JSON),
    "train.json": json.dumps(SQUAD_JSON, indent=1),
    "dev.jsonl.gz": lines(MRQA_LINES),
    "dev.jsonl.xz": lines(MRQA_LINES),
    "dev.jsonl": lines(FLAT_LINES),
}


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_question_of_a_passage_is_read_in_any_format(tmp_path, name):
    """The official converter of MRQA's files keeps the first question of each passage and drops the rest."""
    assert list(qa.read_questions(write(tmp_path, name, FILES[name]))) == [
        {"id": i, "question": q, "context": CONTEXT, "answers": answers} for i, q, answers in QUESTIONS
    ]


def test_a_row_may_have_one_answer_and_no_id(tmp_path):
    rows = [{"context": "c", "question": f"q{n}", "answer": "a"} for n in range(3)]
    found = list(qa.read_questions(write(tmp_path, "train.jsonl", lines(rows))))
    assert [(row["id"], row["question"], row["answers"]) for row in found] == [
        ("0", "q0", ["a"]), ("1", "q1", ["a"]), ("2", "q2", ["a"]),
    ]  # fmt: skip


FIRST = "question: When did Rome fall ? context: Rome fell ( in 476 ) . [ PAR ] x"
PADDED = {
    "question": "When did Rome fall ? ",
    "context": "Rome fell ( in 476 ) . [ PAR ] x",
    "answers": ["476", "in 476"],
}


def test_squads_text_is_t5s(tmp_path):
    write(tmp_path, "dev-v1.1.json", FILES["train-v1.1.json"])
    first, second = texts("squad_v010_allanswers_examples", "validation", tmp_path)
    assert first == {"inputs": FIRST, "targets": "476", "id": "a1"} | PADDED
    assert second["inputs"].startswith("question: What fell ? context: ") and second["targets"] == "Rome"


@pytest.mark.parametrize("task, prefix", [("mrqa_drop_v100_examples", ""), ("spot_mrqa_news_qa_v100", "news_qa ")])
def test_mrqas_text_is_the_official_one(tmp_path, task, prefix):
    name = "dev/DROP.jsonl.gz" if "drop" in task else "mrqa/dev/NewsQA.jsonl.gz"
    write(tmp_path, name, FILES["dev.jsonl.gz"])
    first, second = texts(task, "validation", tmp_path)
    assert first == {"inputs": prefix + FIRST, "targets": "476", "answer": "476", "idx": "a1"} | PADDED
    assert second["idx"] == "a2"


@functools.cache
def real(task, split, folder):
    return texts(task, split, folder, 100)


def padded(text):
    """T5's `_pad_punctuation` by Python's own regular expressions."""
    text = re.sub(f"([{re.escape(string.punctuation)}])", r" \1 ", text)
    return re.sub("[\t\n\f\r ]+", " ", text)


@pytest.mark.parametrize(
    "task, split, path, folder",
    [
        ("squad_v010_allanswers_examples", "validation", "squad/dev.jsonl.xz", "."),
        ("squad_v010_allanswers_examples", "train", "squad/train_partial.jsonl.xz", "squad"),
        ("mrqa_duo_rc_v100_examples", "validation", "mrqa/val_duorc.json", "."),
        ("mrqa_relation_extraction_v100_examples", "validation", "mrqa/val_relation_extraction.json", "mrqa"),
    ],
)
def test_real_rows_are_padded_as_t5_pads_them(data_dir, task, split, path, folder):
    rows = list(itertools.islice(qa.read_questions(data_dir / path), 100))
    found = real(task, split, data_dir / folder)
    for row, example in zip(rows, found, strict=True):
        assert example["context"] == padded(row["context"])
        assert example["answers"] == [padded(answer) for answer in row["answers"]]
        assert example["targets"] == example["answers"][0]
        joined = f"question: {padded(row['question'])} context: {padded(row['context'])}"
        assert example["inputs"] == re.sub(" +", " ", joined)


@pytest.mark.parametrize(
    "path, count, contexts",
    [
        ("squad/dev.jsonl.xz", 10_570, 2_067),
        ("squad/train_partial.jsonl.xz", 11_914, None),
        ("mrqa/train_duorc.json", 127, 12),
        ("mrqa/val_duorc.json", 126, 18),
        ("mrqa/train_relation_extraction.json", 127, 124),
        ("mrqa/val_relation_extraction.json", 128, 127),
        ("mrqa/train_race.json", 127, 109),
    ],
)
def test_no_real_row_is_lost(data_dir, path, count, contexts):
    rows = list(qa.read_questions(data_dir / path))
    assert len(rows) == count
    assert len({row["id"] for row in rows}) == count
    assert contexts is None or len({row["context"] for row in rows}) == contexts


def test_all_of_squads_dev_reaches_the_task(data_dir):
    sources.set_data_dir(str(data_dir / "squad"))
    try:
        rows = qa.squad.get_dataset("validation", shuffle=False)
    finally:
        sources.set_data_dir(None)
    assert rows.cardinality() == 10_570


def test_golden_texts_of_squad(data_dir):
    first = real("squad_v010_allanswers_examples", "validation", data_dir)[0]
    assert first["id"] == "56be4db0acb8001400a502ec"
    assert first["inputs"].startswith(
        "question: Which NFL team represented the AFC at Super Bowl 50 ? context: Super Bowl 50 was an American "
        "football game to determine the champion of the National Football League ( NFL ) for the 2015 season . "
    )
    assert first["inputs"].endswith(" so that the logo could prominently feature the Arabic numerals 50 . ")
    assert first["targets"] == "Denver Broncos" and first["answers"] == ["Denver Broncos"] * 3


def test_golden_texts_of_mrqa(data_dir):
    assert real("mrqa_relation_extraction_v100_examples", "validation", data_dir / "mrqa")[0] == {
        "idx": "85ca66c0550b488f911f84c5e200dcb4",
        "inputs": "question: What is the city where Lake Champlain Chocolates is from ? context: Lake Champlain "
        "Chocolates ( LCC ) is a privately held chocolate manufacturer located in Burlington , Vermont , USA . ",
        "targets": "Burlington",
        "answer": "Burlington",
        "answers": ["Burlington"],
        "question": "What is the city where Lake Champlain Chocolates is from ? ",
        "context": "Lake Champlain Chocolates ( LCC ) is a privately held chocolate manufacturer located in "
        "Burlington , Vermont , USA . ",
    }
    duorc = real("mrqa_duo_rc_v100_examples", "validation", data_dir)[0]
    assert duorc["inputs"].startswith(
        "question: Which rooms does Leaven think are traps context: The film opens with a man , Alderson ( Julian "
        "Richings ) , waking up in a cube - shaped room"
    )
    assert duorc["targets"] == "prime numbers"


def test_answers_are_scored_against_all_of_a_questions(tmp_path):
    """Each taken as the target: the first, the second in other words, and none."""
    write(tmp_path, "dev.jsonl", FILES["dev.jsonl"])
    rows = texts("squad_v010_allanswers_examples", "validation", tmp_path)
    task = seqio.TaskRegistry.get("squad_v010_allanswers_examples")
    targets = [task.postprocess_fn(row["targets"], example=row, is_target=True) for row in rows]
    assert targets == [["476", "in 476"], ["Rome"]]
    (metric,) = task.metric_fns
    for predictions, expected in (
        (["476", "Rome"], {"em": 100.0, "f1": 100.0}),
        (["In  476 .", "the rome"], {"em": 100.0, "f1": 100.0}),
        (["", "Carthage"], {"em": 0.0, "f1": 0.0}),
    ):
        answers = [
            task.postprocess_fn(text, example=row, is_target=False) for text, row in zip(predictions, rows, strict=True)
        ]
        assert metric(targets, answers) == expected


@pytest.mark.parametrize("ood", qa.OUT_OF_DOMAIN)
def test_a_mixture_is_trained_on_squad_alone(ood):
    mixture = seqio.MixtureRegistry.get(f"squad_to_{ood}_examples")
    tasks = {task.name: set(task.splits) for task in mixture.tasks}
    assert tasks == {
        "squad_v010_allanswers_examples": {"train", "validation"},
        f"mrqa_{ood}_v100_examples": {"validation"},
    }
    everything = {task.name for task in seqio.MixtureRegistry.get("squad_to_mrqa_examples").tasks}
    assert set(tasks) <= everything and len(everything) == 7


def test_one_folder_serves_a_mixture(tmp_path):
    write(tmp_path, "squad/dev-v1.1.json", FILES["train-v1.1.json"])
    write(tmp_path, "mrqa/dev/DuoRC.ParaphraseRC.jsonl.gz", FILES["dev.jsonl.gz"])
    for task in seqio.MixtureRegistry.get("squad_to_duo_rc_examples").tasks:
        assert [row["targets"] for row in texts(task.name, "validation", tmp_path)] == ["476", "Rome"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("dev.jsonl", '{"context": "c"', r"dev.jsonl, line 1: .*delimiter.* sound copy"),
        ("dev.jsonl", lines(FLAT_LINES[:1]) + "[]\n", r"dev.jsonl, line 2: "),
        (
            "dev.jsonl",
            lines([FLAT_LINES[0] | {"answers": []}]),
            r"dev.jsonl, line 1, question 'a1': no answer; .*`data_dir`",
        ),
        ("dev.jsonl", lines([FLAT_LINES[0] | {"question": " "}]), r"dev.jsonl, line 1, question 'a1': an empty"),
        ("dev.jsonl", lines([{"context": "c", "question": "q"}]), r"dev.jsonl, line 1, question 0: no field 'answer'"),
        (
            "dev-v1.1.json",
            FILES["train-v1.1.json"].replace('"What fell?"', '""'),
            r"dev-v1.1.json, line 1, question 'a2': an empty or missing text: ''",
        ),
        ("dev-v1.1.json", FILES["train-v1.1.json"][:-9], r"dev-v1.1.json, line 1: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        texts("squad_v010_allanswers_examples", "validation", tmp_path)


def test_a_missing_file_is_named_as_the_benchmark_calls_it(tmp_path):
    with pytest.raises(ValueError, match=r"no train-v1.1.json under `data_dir` .*: set `data_dir`"):
        texts("squad_v010_allanswers_examples", "train", tmp_path)
    with pytest.raises(ValueError, match=r"no dev/RACE.jsonl under `data_dir` .*: set `data_dir`"):
        texts("mrqa_race_v100_examples", "validation", tmp_path)

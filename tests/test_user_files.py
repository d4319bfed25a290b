"""A user's own files, named in gin: what they give, and what is said of what is wrong in them."""

import gzip
import json

import pytest
from tiny import LENGTHS, make_tiny

from prompt_tuning_jax.batches.build import build_missing, build_split
from prompt_tuning_jax.batches.cache import Examples, TaskRequest, load_split
from prompt_tuning_jax.tasks import metrics
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tasks.vocabularies import EOS, Vocabulary

ROWS = [("a dull plot", "bad"), ('a lovely "score"', "good"), ("dull ", "bad"), ("the end", "good")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory)


def write(path, rows=ROWS, columns=("text", "answer")):
    """The rows in the format of the file's name."""
    if ".jsonl" in path.name:
        lines = [json.dumps(dict(zip(columns, row, strict=True)) | {"more": 1}) for row in rows]
    else:
        lines = ["\t".join(("more", *columns)), *("\t".join(("1", *map(str, row))) for row in rows)]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def files(path, **options):
    return TaskFiles({"train": str(path)}, inputs="text", targets="answer", **options)


def built(tiny, folder, task_files, data_dir=None):
    request = TaskRequest("mine", str(tiny.vocabulary), LENGTHS, data_dir, files=task_files)
    build_split(request, "train", folder / "train")
    return Examples(folder / "train")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv", "rows.jsonl.gz", "rows.tsv.gz"])
def test_rows_are_the_two_columns_as_they_stand(tiny, tmp_path, name):
    write(tmp_path / name)
    examples = built(tiny, tmp_path, files(name, labels=["bad", "good"]), str(tmp_path))
    words = Vocabulary(tiny.vocabulary)
    assert [(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in examples.fields] == ROWS
    for row, (text, answer) in enumerate(ROWS):
        assert list(examples.inputs[row]) == [*words.encode(text), EOS]
        assert list(examples.targets[row]) == [*words.encode(answer), EOS]
    assert examples.labels == ("bad", "good")
    assert examples.score(["bad", "good", "good", "no label"]) == {"accuracy": 50}


def test_a_label_may_be_given_by_its_place(tmp_path):
    rows = [("a", 1), ("b", "0"), ("c", "bad")]
    expected = [{"inputs": text, "targets": answer} for text, answer in zip("abc", ("good", "bad", "bad"), strict=True)]
    for name in ("rows.jsonl", "rows.tsv"):
        path = write(tmp_path / name, rows)
        assert list(files(path, labels=["bad", "good"]).rows(path)) == expected
    path = write(tmp_path / "digits.tsv", [("a", "1")])
    assert list(files(path, labels=["1", "2"]).rows(path)) == [{"inputs": "a", "targets": "1"}], "first by its name"


@pytest.mark.parametrize(
    "options, answers, predictions, expected",
    [
        ({}, ["one two", "three"], ["one two", "four"], {"accuracy": 50}),
        ({"metrics": []}, ["one", "two"], ["one", "two"], {}),
        ({"metrics": ["pearson"]}, ["1.5", "2.5", "4"], ["3", "5", "8"], {"pearson_corrcoef": 100}),
        (
            {"labels": ["a", "b"], "metrics": ["accuracy", "f1"]},
            ["a", "b", "b"],
            ["a", "b", "a"],
            {"accuracy": 200 / 3, "f1": 200 / 3},
        ),
        (
            {"labels": ["a", "b", "c", "d"], "metrics": ["mean_f1"]},
            ["a", "b", "c", "d"],
            ["a", "b", "c", "a"],
            {"mean_4class_f1": 100 * (2 / 3 + 1 + 1) / 4},
        ),
    ],
)
def test_answers_are_scored_as_asked(tiny, tmp_path, options, answers, predictions, expected):
    path = write(tmp_path / "rows.jsonl", [("text", answer) for answer in answers])
    assert built(tiny, tmp_path, files(path, **options)).score(predictions) == pytest.approx(expected)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"}', "no column 'answer', there are 'text': set TARGETS_COLUMN"),
        ('{"answer": "bad"}', "no column 'text', there are 'answer': set INPUTS_COLUMN"),
        ('{"text": "", "answer": "bad"}', "text is '', expected some text"),
        ('{"text": null, "answer": "bad"}', "text is None, expected some text"),
        ('{"text": "a", "answer": "fine"}', "answer 'fine' is none of 'bad', 'good', nor the place of one: set LABELS"),
        ('{"text": "a", "answer": 2}', "answer 2 is none of 'bad', 'good', nor the place of one: set LABELS"),
        ('{"text": "a", "answer": true}', "answer True is none of 'bad', 'good', nor the place of one: set LABELS"),
        ("[1]", "[1], expected an object with a field for each column"),
        ('{"text": "a"', "no JSON at character 13: Expecting ',' delimiter"),
        ("", "no JSON at character 1: Expecting value"),
    ],
)
def test_a_row_that_is_not_sound_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "answer": "bad"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        list(files(path, labels=["bad", "good"]).rows(path))
    assert str(error.value) == f"{path}, line 2: {message}"


@pytest.mark.parametrize(
    "content, message",
    [
        ("text\tlabel\na\tbad\n", "line 1: no column 'answer', there are 'text', 'label': set TARGETS_COLUMN"),
        ("text\tanswer\na\n", "line 2: 1 columns, expected 2"),
        ("text\tanswer\na\tbad\n \tbad\n", "line 3: text is ' ', expected some text"),
    ],
)
def test_a_table_that_is_not_sound_is_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.tsv"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        list(files(path).rows(path))
    assert str(error.value) == f"{path}, {message}"


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"text\tanswer\na\tb\ncaf\xe9\tb\n")
    with pytest.raises(ValueError, match=f"^{path}, line 3: not UTF-8"):
        list(files(path).rows(path))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("absent.tsv", {}, "no file {folder}/absent.tsv: set TASK_FILES, and DATA_DIR where they are under it"),
        ("rows.csv", {}, "{folder}/rows.csv is neither .jsonl nor .tsv: set TASK_FILES"),
        ("empty.tsv", {}, "{folder}/empty.tsv has no rows: set TASK_FILES"),
        (
            "rows.tsv",
            {"metrics": ["f1"]},
            "no metric 'f1' without LABELS, there are accuracy, rouge, pearson, spearman",
        ),
        ("rows.tsv", {"metrics": ["rouge"], "labels": ["bad", "good"]}, "no metric 'rouge' with LABELS, there are acc"),
        ("rows.tsv", {"metrics": ["accuracy", "pearson"]}, "accuracy and pearson do not go together"),
    ],
)
def test_what_cannot_be_a_task_is_refused(tiny, tmp_path, name, options, message):
    write(tmp_path / "rows.tsv")
    (tmp_path / "rows.csv").write_text("text,answer\n")
    (tmp_path / "empty.tsv").write_text("text\tanswer\n")
    with pytest.raises(ValueError) as error:
        built(tiny, tmp_path, files(name, **options), str(tmp_path))
    assert str(error.value).startswith(message.format(folder=tmp_path))
    assert not (tmp_path / "train").exists()


def test_metrics_that_are_offered_are_there():
    from prompt_tuning_jax.tasks import user_files

    for name in (*user_files._OF_LABELS, *user_files._OF_TEXTS, *user_files._OF_NUMBERS):
        assert callable(getattr(metrics, name))


def test_a_changed_file_is_read_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment["PYTHONPATH"])
    path, cache = write(tmp_path / "rows.tsv"), tmp_path / "cache"
    request = TaskRequest("mine", str(tiny.vocabulary), LENGTHS, files=files(path))
    build_missing(request, "train", cache, True)
    assert len(load_split(request, "train", cache)) == 4
    write(path, ROWS[:3])
    assert len(load_split(request, "train", cache)) == 3


def test_a_run_on_files_named_in_gin(tiny, tmp_path):
    """Training and then scoring, with no Python: the same files.gin for both."""
    macros = {"MIXTURE_OR_TASK_NAME": "mine", "TASK_FILES": {"train": "rows.tsv", "validation": "dev.jsonl"}}
    macros |= {"DATA_DIR": str(tmp_path), "INPUTS_COLUMN": "text", "TARGETS_COLUMN": "answer"}
    macros |= {"LABELS": ["bad", "good"], "METRICS": ["accuracy", "f1"], "EVAL_SPLIT": "validation"}
    write(tmp_path / "rows.tsv", ROWS * 4)
    write(tmp_path / "dev.jsonl")
    given = ("prompts/random_uniform.gin", "runs/prompt_tune.gin", "tasks/files.gin")
    run = tiny.arguments(*given, **macros, TRAIN_STEPS=4, EVAL_PERIOD=4, LOG_PERIOD=4, MODEL_DIR=str(tmp_path / "run"))
    done = tiny.run(run)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "mine" and {*summary["best"]} == {"accuracy", "f1"}

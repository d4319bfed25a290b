"""A user's own files: what they give, that they are read again at each start, and what is said of what is wrong."""

import gzip
import json
import os
import subprocess
import sys

import gin
import pytest
from cached import score
from tiny import LENGTHS, own_caches

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.tasks import metrics, rows
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import EOS, Vocabulary
from prompt_tuning_jax.train import main as train

ROWS = [("a dull plot", "bad"), ('a lovely "score"', "good"), ("dull ", "bad"), ("the end", "good")]


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


def read(tiny, task_files, split="train"):
    """The examples of a split, as evaluation gets them."""
    batches = DatasetConfig("mine", split, 4, LENGTHS, source=task_files).eval_batches(Vocabulary(tiny.vocabulary))
    return batches["mine"].examples


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv", "rows.jsonl.gz", "rows.tsv.gz"])
def test_rows_are_the_two_columns_as_they_stand(tiny, tmp_path, name):
    write(tmp_path / name)
    examples = read(tiny, files(name, labels=["bad", "good"], data_dir=str(tmp_path)))
    words = Vocabulary(tiny.vocabulary)
    assert [(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in examples.fields] == ROWS
    for row, (text, answer) in enumerate(ROWS):
        assert list(examples.inputs[row]) == [*words.encode(text), EOS]
        assert list(examples.targets[row]) == [*words.encode(answer), EOS]
    assert answers(examples.postprocess) == ("bad", "good")
    assert score(examples, ["bad", "good", "good", "no label"]) == {"accuracy": 50}


def test_a_label_may_be_given_by_its_index(tmp_path):
    given = [("a", 1), ("b", "0"), ("c", "bad")]
    expected = [{"inputs": text, "targets": answer} for text, answer in zip("abc", ("good", "bad", "bad"), strict=True)]
    for name in ("rows.jsonl", "rows.tsv"):
        path = write(tmp_path / name, given)
        assert files(path, labels=["bad", "good"]).rows("train") == expected
    path = write(tmp_path / "digits.tsv", [("a", "1")])
    assert files(path, labels=["1", "2"]).rows("train") == [{"inputs": "a", "targets": "1"}], "first by its name"


@pytest.mark.parametrize(
    "labels, value, expected",
    [
        (["1", "2", "3", "4", "5"], 1, "1"),
        (["1", "2", "3", "4", "5"], "4", "4"),
        (["1", "0"], 1, "1"),
        (["1", "0"], 0, "0"),
        (["0.5", "1.5"], 0.5, "0.5"),
        (["bad", "good"], 1, "good"),
        (["bad", "good"], "0", "bad"),
        (["1", "2"], 0, None),
        (["1", "2"], "0", None),
        (["one", "2"], 0, None),
        (["0.5", "1.5"], 1, None),
        (["1", "2"], 1.0, None),
        (["1", "2"], True, None),
        (["bad", "good"], "01", None),
        (["bad", "good"], 1.0, None),
        (["bad", "good"], "9" * 20, None),
    ],
)
def test_a_value_that_is_a_label_is_no_index(tmp_path, labels, value, expected):
    """An index is taken only where no label is a number."""
    path = write(tmp_path / "rows.jsonl", [("a", value)])
    source = files(path, labels=labels)
    if expected is not None:
        assert source.rows("train") == [{"inputs": "a", "targets": expected}]
        return
    with pytest.raises(ValueError) as error:
        source.rows("train")
    number = any(label[0].isdigit() for label in labels)
    ending = "not read as an index, because some labels are numbers: set `labels`" if number else "nor the index of one"
    assert str(error.value).startswith(f"{path}, line 1: answer {value!r} is not one of the labels ") and ending in str(
        error.value
    )


def test_labels_that_are_there_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^`labels` is \['a', 'b', 'a'\]: 'a' is there twice, expected once$"):
        files(tmp_path / "rows.tsv", labels=["a", "b", "a"])


@pytest.mark.parametrize("target", ["NaN", "inf", "about 3", "-"])
def test_a_target_that_is_no_number_is_refused_where_numbers_are_compared(tmp_path, target):
    path = write(tmp_path / "rows.tsv", [("a", "1.5"), ("b", target)])
    with pytest.raises(ValueError) as error:
        files(path, metrics=["spearman"]).rows("train")
    expected = f"answer is {target!r}, expected a finite number, which `metrics` compares"
    assert str(error.value) == f"{path}, line 3: {expected}"
    assert files(path).rows("train")[1]["targets"] == target


@pytest.mark.parametrize(
    "options, targets, predictions, expected",
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
def test_answers_are_scored_as_asked(tiny, tmp_path, options, targets, predictions, expected):
    path = write(tmp_path / "rows.jsonl", [("text", target) for target in targets])
    assert score(read(tiny, files(path, **options)), predictions) == pytest.approx(expected)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"}', "no column 'answer', there are 'text': set `targets`"),
        ('{"answer": "bad"}', "no column 'text', there are 'answer': set `inputs`"),
        ('{"text": "", "answer": "bad"}', "text is '', expected some text"),
        ('{"text": null, "answer": "bad"}', "text is None, expected some text"),
        (
            '{"text": "a", "answer": "ok"}',
            "answer 'ok' is not one of the labels 'bad', 'good', nor the index of one: set `labels`",
        ),
        (
            '{"text": "a", "answer": 2}',
            "answer 2 is not one of the labels 'bad', 'good', nor the index of one: set `labels`",
        ),
        (
            '{"text": "a", "answer": true}',
            "answer True is not one of the labels 'bad', 'good', nor the index of one: set `labels`",
        ),
        ("[1]", "[1], expected an object with a field for each column"),
        ('{"text": "a"', "no JSON at character 13: Expecting ',' delimiter"),
        (" ", "no JSON at character 1: Expecting value"),
        ('{"text": "a", "answer": "bad", "text": "b"}', "two fields 'text', expected one"),
        ("[" * 200_000, "JSON that is nested too deep, expected an object with a field for each column"),
        ('{"text": "a\\ud800", "answer": "bad"}', "text is no Unicode text: half of a surrogate pair at character 2"),
    ],
)
def test_a_row_that_is_not_sound_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "answer": "bad"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        files(path, labels=["bad", "good"]).rows("train")
    assert str(error.value) == f"{path}, line 2: {message}"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_none_is_no_target(tmp_path, number):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a", "answer": {number}}}\n')
    with pytest.raises(ValueError, match=rf"^{path}, line 1: answer is {float(number)}, expected some text$"):
        files(path, metrics=["pearson"]).rows("train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("text\tlabel\na\tbad\n", "line 1: no column 'answer', there are 'text', 'label': set `targets`"),
        ("text\tanswer\na\n", "line 2: 1 columns, expected 2"),
        ("text\tanswer\tanswer\na\tb\tc\n", "line 1: two columns 'answer', expected one"),
        ("text\tanswer\n\t\n", "line 2: text is '', expected some text"),
        ("text\tanswer\na\tbad\n \tbad\n", "line 3: text is ' ', expected some text"),
    ],
)
def test_a_table_that_is_not_sound_is_named_by_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.tsv"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        files(path).rows("train")
    assert str(error.value) == f"{path}, {message}"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.tsv"])
def test_empty_lines_are_skipped(tmp_path, name):
    path = write(tmp_path / name)
    expected = files(path).rows("train")
    assert len(expected) == len(ROWS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", *lines[1:], "", ""]) + "\n")
    assert files(path).rows("train") == expected
    path.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert files(path).rows("train") == expected
    path.write_text("\n\n")
    with pytest.raises(ValueError, match=rf"^{path} has no rows: set `mapping`$"):
        files(path).rows("train")


def test_bytes_that_are_no_text_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"text\tanswer\na\tb\ncaf\xe9\tb\n")
    with pytest.raises(ValueError, match=rf"^{path}, line 3: not UTF-8 \(.*\): mend the file, or set `mapping`$"):
        files(path).rows("train")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("absent.tsv", {}, "no file {folder}/absent.tsv: set `mapping`, and `data_dir` if it is under it"),
        ("rows.csv", {}, "{folder}/rows.csv is neither .jsonl nor .tsv: set `mapping`"),
        ("empty.tsv", {}, "{folder}/empty.tsv has no rows: set `mapping`"),
        (
            "rows.tsv",
            {"metrics": ["f1"]},
            "no metric 'f1' without `labels`, there are accuracy, rouge, pearson, spearman: set `metrics`",
        ),
        (
            "rows.tsv",
            {"metrics": ["rouge"], "labels": ["bad", "good"]},
            "no metric 'rouge' with `labels`, there",
        ),
        ("rows.tsv", {"metrics": ["accuracy", "pearson"]}, "accuracy and pearson cannot be combined, because some"),
        ("rows.tsv", {"metrics": "accuracy"}, "`metrics` is 'accuracy', expected a list of names: ['accuracy']"),
        ("rows.tsv", {"labels": "bad good"}, "`labels` is 'bad good', expected a list of texts"),
        ("rows.tsv", {"labels": ["bad", " "]}, "`labels` is ['bad', ' '], expected texts that are not blank"),
        ("rows.tsv", {"labels": []}, "`labels` is [], expected texts that are not blank"),
    ],
)
def test_what_cannot_be_a_task_is_refused(tiny, tmp_path, name, options, message):
    write(tmp_path / "rows.tsv")
    (tmp_path / "rows.csv").write_text("text,answer\n")
    (tmp_path / "empty.tsv").write_text("text\tanswer\n")
    with pytest.raises(ValueError) as error:
        read(tiny, files(name, **options, data_dir=str(tmp_path)))
    assert str(error.value).startswith(message.format(folder=tmp_path))


def test_metrics_that_are_offered_are_there():
    for name in (*rows.OF_LABELS, *rows.OF_TEXTS, *rows.OF_NUMBERS):
        assert callable(getattr(metrics, name))


def texts(examples):
    return [row["inputs_pretokenized"] for row in examples.fields]


def test_a_changed_file_is_read_again(tiny, tmp_path):
    """Of the same size and time, too: nothing is kept of what was read."""
    path = write(tmp_path / "rows.tsv", [("a dull plot", "bad")])
    before = path.stat()
    assert texts(read(tiny, files(path))) == ["a dull plot"]
    write(path, [("a good plot", "bad")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert texts(read(tiny, files(path))) == ["a good plot"]


def test_a_relative_name_is_that_of_the_working_directory(tiny, tmp_path, monkeypatch):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.tsv", [(f"the {name} folder", "bad")])
    for name in ("one", "other", "one"):
        monkeypatch.chdir(tmp_path / name)
        assert texts(read(tiny, files("rows.tsv"))) == [f"the {name} folder"]


def test_a_link_that_points_elsewhere_is_followed_anew(tiny, tmp_path):
    for name in ("one", "other"):
        write(tmp_path / f"{name}.tsv", [(f"the {name} file", "bad")])
    link = tmp_path / "rows.tsv"
    for name in ("one", "other"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / f"{name}.tsv")
        assert texts(read(tiny, files(link))) == [f"the {name} file"]


def test_a_split_or_slice_that_is_not_there(tiny, tmp_path):
    path = write(tmp_path / "rows.tsv")
    assert texts(read(tiny, files(path), "train[1:-1]")) == [text for text, _ in ROWS[1:-1]]
    with pytest.raises(ValueError, match=r"^mine has no split 'validation', only train: set `train` or `validation`$"):
        read(tiny, files(path), "validation")
    with pytest.raises(ValueError, match=r"^split 'train\[4:\]' of mine is empty: set `train` or `validation`"):
        read(tiny, files(path), "train[4:]")


def test_a_run_on_files_named_in_gin(tiny, tmp_path):
    """Neither it nor `eval` starts a child, and neither TensorFlow nor cached tokens are there at the end."""
    macros = {"MIXTURE_OR_TASK_NAME": "mine", "TASK_FILES": {"train": "rows.tsv", "validation": "dev.jsonl"}}
    macros |= {"DATA_DIR": str(tmp_path), "INPUTS_COLUMN": "text", "TARGETS_COLUMN": "answer"}
    macros |= {"LABELS": ["bad", "good"], "METRICS": ["accuracy", "f1"], "EVAL_SPLIT": "validation"}
    write(tmp_path / "rows.tsv", ROWS * 4)
    write(tmp_path / "dev.jsonl")
    given = ("prompts/random_uniform.gin", "runs/prompt_tune.gin", "tasks/files.gin")
    run = tiny.arguments(*given, **macros, TRAIN_STEPS=4, EVAL_PERIOD=4, LOG_PERIOD=4, MODEL_DIR=str(tmp_path / "run"))
    done = tiny.run_process(run, python=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "mine" and {*summary["best"]} == {"accuracy", "f1"}
    macros |= {"TASK_FEATURE_LENGTHS": LENGTHS, "INITIAL_CHECKPOINT_PATH": str(tiny.base)}
    macros |= {"PROMPT_FILE": str(tmp_path / "run" / "best" / "prompt.npy")}
    scored = subprocess.run(
        [
            *(sys.executable, "-X", "importtime", "-m", "prompt_tuning_jax.eval"),
            *(f"--gin_file={file}" for file in (tiny.gin, "runs/eval.gin", "tasks/files.gin")),
            *(f"--gin.{name}={value!r}" for name, value in macros.items()),
        ],
        env=os.environ | tiny.environment, cwd=tiny.folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["generation"] == summary["best"]
    for stderr in (done.stderr, scored.stderr):
        imported = [line.rpartition("|")[2].strip() for line in stderr.splitlines()]
        assert "sentencepiece" in imported
        assert not [name for name in imported if name.startswith(("tensorflow.", "seqio.", "torch."))]
        assert "tokenising" not in stderr
    assert not list((tiny.folder / "cache").rglob("mine*"))


@pytest.mark.parametrize(
    "macros, message",
    [
        (
            {"TASK_FILES": {"train": "absent.tsv"}},
            "no file {folder}/absent.tsv: set TASK_FILES, and DATA_DIR if it is under it",
        ),
        (
            {"TASK_FILES": "rows.tsv"},
            "TASK_FILES is 'rows.tsv', expected the file of each split: ",
        ),
        (
            {"LABELS": ["yes", "no"]},
            "{folder}/rows.tsv, line 2: answer 'bad' is not one of the labels 'yes', 'no', ",
        ),
        ({"LABELS": "bad good"}, "LABELS is 'bad good', expected a list of texts"),
        (
            {"METRICS": ["f1"]},
            "no metric 'f1' without LABELS, there are accuracy, rouge, pearson, spearman: set METRICS",
        ),
        (
            {"INPUTS_COLUMN": "txt"},
            "{folder}/rows.tsv, line 1: no column 'txt', there are 'more', ",
        ),
    ],
)
def test_a_mistake_in_gin_is_said_in_gins_words(tiny, tmp_path, capsys, monkeypatch, macros, message):
    write(tmp_path / "rows.tsv")
    given = {"MIXTURE_OR_TASK_NAME": "mine", "TASK_FILES": {"train": "rows.tsv"}, "EVAL_SPLIT": "train"}
    given |= {"DATA_DIR": str(tmp_path), "INPUTS_COLUMN": "text", "TARGETS_COLUMN": "answer"}
    given |= {"MODEL_DIR": str(tmp_path / "run")} | macros
    arguments = tiny.arguments("prompts/random_uniform.gin", "runs/prompt_tune.gin", "tasks/files.gin", **given)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    gin.clear_config()
    with own_caches(tiny, monkeypatch), pytest.raises(SystemExit) as stop:
        train()
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert capsys.readouterr().err.startswith(f"error: {message.format(folder=tmp_path)}")

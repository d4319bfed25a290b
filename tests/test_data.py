"""What Python callers train and evaluate on: tasks, files and rows, and what is said of anything else."""

import collections
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
from tiny import LENGTHS, ROOT

from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.data import Data, dataset_of, default_lengths, files, task
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import EMBEDDED
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tokenizers.vocabulary import BESIDE, Vocabulary

WORDS = Vocabulary(EMBEDDED["nano"] / BESIDE)
ROWS = [{"inputs": f"the {noun} was {word}", "targets": label} for noun in ("film", "plot", "score")
        for word, label in (("dull", "bad"), ("great", "good"))]  # fmt: skip


def of(data, split="train", **options):
    return dataset_of(data, split, batch_size=4, lengths=LENGTHS, **options)


def examples(data, split="train", **options):
    (batches,) = of(data, split, **options).eval_batches(WORDS, say=None).values()
    return batches.examples


def pairs(found):
    return [(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in found.fields]


TEXTS = [(row["inputs"], row["targets"]) for row in ROWS]


class Lazy(collections.abc.Sequence):
    """Rows that are made when they are asked for, as libraries of data sets have them."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return {name: [row[name] for row in ROWS[at]] for name in ROWS[0]}
        return dict(ROWS[at])


@pytest.mark.parametrize(
    "rows", [ROWS, tuple(ROWS), Lazy(), np.array(ROWS), collections.deque(map(collections.UserDict, ROWS))]
)
def test_rows_in_memory(rows):
    found = examples(rows, "validation", labels=["bad", "good"])
    assert pairs(found) == TEXTS and answers(found.postprocess) == ("bad", "good")
    config = of(rows, "validation", labels=["bad", "good"])
    assert (config.mixture_or_task_name, config.split, config.batch_size) == ("rows", "validation", 4)
    assert [metric(["x", "y"], ["x", "z"]) for metric in examples(rows).metrics] == [{"accuracy": 50}]
    assert examples(rows, metrics=[]).metrics == []


def test_what_a_row_may_hold():
    rows = [
        {"inputs": 7, "targets": "1", "id": "x"},
        {"inputs": np.float32(0.5), "targets": np.int64(0), "id": None},
        {"inputs": "ß", "targets": "bad"},
    ]
    found = examples(rows, labels=["bad", "good"])
    assert pairs(found) == [("7", "good"), ("0.5", "bad"), ("ß", "bad")]
    assert [row.get("id", "none") for row in found.fields] == ["x", None, "none"]
    assert pairs(examples([{"inputs": "1+1", "targets": 2}, {"inputs": "1/2", "targets": 0.5}])) == [
        ("1+1", "2"), ("1/2", "0.5"),
    ]  # fmt: skip


def test_rows_are_taken_as_they_are():
    """A change of the list after the call is no change of the run's data."""
    rows = [dict(row) for row in ROWS]
    config = of(rows)
    rows[0]["inputs"] = "changed"
    rows.pop()
    assert pairs(config.batches(WORDS, say=None).examples) == TEXTS
    before = examples(ROWS).fingerprint()
    assert examples(rows).fingerprint() != before == config.batches(WORDS, say=None).fingerprint()
    assert pairs(pickle.loads(pickle.dumps(config)).batches(WORDS, say=None).examples) == TEXTS


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "dev.tsv").write_text("text\tanswer\n" + "".join(f"{text}\t{answer}\n" for text, answer in TEXTS[:2]))
    return tmp_path


def test_files(folder, monkeypatch):
    data = files({"train": folder / "train.jsonl"}, labels=["bad", "good"])
    assert pairs(examples(data)) == TEXTS and answers(examples(data).postprocess) == ("bad", "good")
    assert pairs(examples(data["train[1:-2]"], "validation")) == TEXTS[1:-2]
    assert data.split is None and of(data["train[1:-2]"], "validation").split == "train[1:-2]"
    monkeypatch.chdir(folder)
    other = files({"validation": "dev.tsv"}, inputs="text", targets="answer", metrics=["rouge"])
    assert pairs(examples(other, "validation")) == TEXTS[:2]
    assert [metric.func.__name__ for metric in examples(other, "validation").metrics] == ["rouge"]
    assert pairs(examples(files({"train": "train.jsonl"}, data_dir=folder))) == TEXTS
    late = examples(files({"train": "train.jsonl"}), labels=["good", "bad"], metrics=["accuracy", "f1"])
    assert answers(late.postprocess) == ("good", "bad") and len(late.metrics) == 2
    assert late.token_fingerprint() == examples(ROWS).token_fingerprint()


def test_a_task(tiny, tmp_path, monkeypatch):
    data = task("glue_sst2_v200", data_dir=pathlib.Path("glue"), cache_dir="cache", module="own")
    assert of(data["train[:-500]"], "validation") == DatasetConfig(
        "glue_sst2_v200", "train[:-500]", 4, LENGTHS, module="own", data_dir="glue", cache_dir="cache"
    )
    assert of(data, "validation").split == "validation"
    request = TaskRequest("demo_reviews", WORDS.path, LENGTHS)
    build_missing(request, "validation", tmp_path, False)
    found = examples(task("demo_reviews", cache_dir=tmp_path)["validation[:9]"])
    assert len(found) == 9 and answers(found.postprocess) == ("negative", "positive")


def once(rows):
    yield from rows


class DataFrame:
    """Has what tells a data frame of pandas from other data."""

    columns = ("inputs", "targets")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, kind):
        """Is looked for, and never called."""


ROWS_EXPECTED = "a sequence of rows {'inputs': ..., 'targets': ...}, or pt.task(...) or pt.files(...)"


@pytest.mark.parametrize(
    "data, message",
    [
        (
            "train.jsonl",
            "is a text, 'train.jsonl': for a file write pt.files({'train': 'train.jsonl'}), for a SeqIO task "
            f"pt.task('train.jsonl'); expected {ROWS_EXPECTED}",
        ),
        (pathlib.Path("a.tsv"), "is a path, 'a.tsv': for a file write pt.files({'train': 'a.tsv'}), for a SeqIO task"),
        (DataFrame(), "is a DataFrame: give its rows, frame.to_dict('records')"),
        (
            {"inputs": ["a"], "targets": ["b"]},
            "is a mapping with the keys 'inputs', 'targets': if they are columns, give their rows: "
            "[dict(zip(data, row)) for row in zip(*data.values())]; expected " + ROWS_EXPECTED,
        ),
        (
            {"train": "train.jsonl"},
            "is a mapping with the keys 'train': choose one of its values, or write pt.files({...}) for files; ",
        ),
        (once(ROWS), "is a generator, which can be read only once: give list(...) of it"),
        (map(dict, ROWS), "is a map, which can be read only once: give list(...) of it"),
        ([], "has no rows, expected one or more"),
        (None, f"is None, expected {ROWS_EXPECTED}"),
        (17, f"is 17, expected {ROWS_EXPECTED}"),
        (files, "is <function fil"),
        (["a film"], ", row 0 is 'a film', expected a mapping with the keys 'inputs' and 'targets'"),
        ([("a", "b")], ", row 0 is ('a', 'b'), expected a mapping with the keys 'inputs' and 'targets'"),
        ([*ROWS, {"text": "a", "targets": "b"}], ", row 6 has no 'inputs'; its keys are 'text', 'targets'"),
        ([{"text": "a", "label": "b"}], ", row 0 has no 'inputs' and no 'targets'; its keys are 'text', 'label'"),
        ([{}], ", row 0 has no 'inputs' and no 'targets'; its keys are none"),
        ([{"inputs": None, "targets": "b"}], ", row 0: inputs is None, expected some text"),
        ([{"inputs": "a", "targets": "  "}], ", row 0: targets is '  ', expected some text"),
        ([{"inputs": b"a", "targets": "b"}], ", row 0: inputs is b'a', expected some text"),
        ([{"inputs": "a", "targets": True}], ", row 0: targets is True, expected some text"),
        ([{"inputs": "a", "targets": float("nan")}], ", row 0: targets is nan, expected some text"),
        ([{"inputs": "a", "targets": ["b"]}], ", row 0: targets is ['b'], expected some text"),
        ([{"inputs": "a\udfff", "targets": "b"}], ", row 0: inputs is no Unicode text: half of a surrogate pair at ch"),
    ],
)
def test_what_is_no_data_is_refused_in_one_sentence(data, message):
    with pytest.raises(SettingError) as error:
        of(data)
    joined = message if message.startswith(",") else f" {message}"
    assert str(error.value).startswith(f"`train`{joined}") and error.value.setting == "train"
    with pytest.raises(SettingError) as error:
        of(data, setting="data")
    assert str(error.value).startswith("`data`") or not data


def test_labels_and_metrics_that_do_not_go_with_the_data(folder):
    given = files({"train": folder / "train.jsonl"}, labels=["bad", "good"], metrics=["accuracy"])
    for data, options, message in (
        (
            ROWS,
            {"labels": ["bad", "fine"]},
            "`train`, row 1: targets 'good' is not one of the labels 'bad', 'fine', nor the index of",
        ),
        (ROWS, {"labels": "bad good"}, "`labels` is 'bad good', expected a list of texts"),
        (
            ROWS,
            {"metrics": ["f1"]},
            "no metric 'f1' without `labels`, there are accuracy, rouge, pearson, spearman: set",
        ),
        (given, {"labels": ["bad", "good"]}, "`labels` is given twice, also with the files: leave out one"),
        (given, {"metrics": ["f1"]}, "`metrics` is given twice, also with the files: leave out one"),
        (
            task("demo_reviews"),
            {"labels": ["a"]},
            "`labels` is given, but the task demo_reviews has its own: leave it out",
        ),
        (task("demo_reviews"), {"metrics": []}, "`metrics` is given, but the task demo_reviews has its own: leave it"),
    ):
        with pytest.raises(SettingError) as error:
            of(data, **options)
        assert str(error.value).startswith(message)


def test_names_and_splits_that_are_none(folder):
    data = files({"train": folder / "train.jsonl"})
    for call, message in (
        (lambda: data["validation"], "files has no split 'validation', only train: set `train` or `validation`"),
        (lambda: of(data, "validation"), "files has no split 'validation', only train: set `train` or `validation`"),
        (lambda: data["train[:10%]"], "split 'train[:10%]', expected a name or a slice such as train[:-2000]: set"),
        (lambda: data[0], "split 0, expected a name or a slice as text: data['train[:-500]']"),
        (lambda: data[:10], "split slice(None, 10, None), expected a name or a slice as text: data['train[:-500]']"),
        (
            lambda: files("train.jsonl"),
            "`mapping` is 'train.jsonl', expected the file of each split: {'train': 'train.js",
        ),
        (lambda: files({}), "`mapping` is {}, expected the file of each split"),
        (
            lambda: of(data["train[6:]"]).batches(WORDS),
            "split 'train[6:]' of files is empty: set `train` or `validation`",
        ),
    ):
        with pytest.raises(SettingError) as error:
            call()
        assert str(error.value).startswith(message)
    with pytest.raises(TypeError, match="'Data' object is not iterable"):
        list(data)
    assert isinstance(data, Data)


def test_rows_of_a_module_make_no_sense():
    config = DatasetConfig("rows", "train", 4, LENGTHS, module="own", source=of(ROWS).source)
    with pytest.raises(SettingError, match=r"^`module` is 'own', but the rows are those of Rows, not of a SeqIO task"):
        config.batches(WORDS)


def tokens(text):
    return len(WORDS.encode(text)) + 1


def test_default_lengths_hold_the_longest_target(folder, tmp_path):
    long = "a target of many words, and of some more"
    assert tokens("bad") < tokens(long) < 512
    rows = [*ROWS, {"inputs": "x", "targets": long}]
    assert (
        default_lengths(ROWS, rows, WORDS)
        == default_lengths(rows, ROWS, WORDS)
        == {"inputs": 512, "targets": tokens(long)}
    )
    assert default_lengths(ROWS, ROWS, WORDS)["targets"] == max(tokens("bad"), tokens("good"))
    labels = ["bad", "good", "not labelled in these rows"]
    assert default_lengths(ROWS, ROWS, WORDS, labels)["targets"] == tokens(labels[2])
    endless = [{"inputs": "x", "targets": "many words " * 1_000}]
    assert default_lengths(endless, ROWS, WORDS) == {"inputs": 512, "targets": 512}

    (folder / "dev.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[-1]) + "\n")
    both = files({"train": folder / "train.jsonl", "validation": folder / "dev.jsonl"})
    assert default_lengths(both, both, WORDS)["targets"] == tokens(long)
    assert default_lengths(both, both["validation[:1]"], WORDS)["targets"] == tokens("good")
    labelled = files({"train": folder / "train.jsonl"}, labels=labels)
    assert default_lengths(labelled, ROWS, WORDS, ["bad", "good"])["targets"] == tokens(labels[2])

    request = TaskRequest("demo_reviews", WORDS.path, {"inputs": 512, "targets": 512})
    for split in ("train", "validation"):
        build_missing(request, split, tmp_path / "cache", False)
    reviews = task("demo_reviews", cache_dir=tmp_path / "cache")
    assert default_lengths(reviews, reviews, WORDS)["targets"] == max(tokens("negative"), tokens("positive"))


def test_data_is_light():
    program = (
        "import sys\n"
        "from prompt_tuning_jax.batches.data import dataset_of, files, task\n"
        "from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary\n"
        "rows = [{'inputs': 'a film', 'targets': 'good'}] * 9\n"
        f"config = dataset_of(rows, 'train', batch_size=4, lengths={LENGTHS})\n"
        f"config.batches(Vocabulary({WORDS.path!r}), say=None)[0]\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "sentencepiece" in done.stdout.split() and not done.stderr
    assert not {*done.stdout.split()} & {"tensorflow", "seqio", "tensorflow_text", "torch", "jax"}

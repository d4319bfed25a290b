"""Mixtures by rate: which task comes when, which of its examples, and how several tasks are evaluated."""

import collections
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cached import score
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import LENGTHS, assert_equal, joined, make_examples, seeds, tokens
from tiny import LENGTHS as TINY_LENGTHS
from tiny import ROOT

from prompt_tuning_jax.batches import cache as cache_module
from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import Part, TaskRequest
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batches, MixedBatches
from prompt_tuning_jax.batches.mixing import Mixing
from prompt_tuning_jax.tasks.metrics import record_score
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

rates = st.lists(st.floats(0.001, 1_000), min_size=1, max_size=8)


@given(rates, seeds, st.integers(0, 10**7))
def test_every_task_has_its_share_of_any_number_of_draws(rates, seed, number):
    share = np.array(rates) / sum(rates)
    counts = Mixing(rates, seed).counts(number)
    assert counts.sum() == number and (counts >= 0).all()
    assert (np.abs(counts - number * share) < 1 + len(rates) * share).all()


@given(rates, seeds, st.integers(0, 10**6))
def test_draws_are_the_steps_of_their_counts(rates, seed, start):
    mixing = Mixing(rates, seed)
    draws, counts = mixing.draws(start), mixing.counts(start)
    for number in range(start + 1, start + 30):
        counts[next(draws)] += 1
        np.testing.assert_array_equal(counts, mixing.counts(number))


def test_another_seed_draws_in_another_order():
    shares = [5.0, 3.3, 2.1, 1.2]
    orders = {tuple(itertools.islice(Mixing(shares, seed).draws(0), 50)) for seed in range(5)}
    assert len(orders) == 5


@st.composite
def mixtures(draw):
    """One to four tasks of other sizes, lengths and rates; no two examples have the same tokens."""
    parts = {}
    for task in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(3, 60), min_size=1, max_size=25))
        inputs = [[task + 2, at + 2, *tokens(length - 2, 0)] for at, length in enumerate(lengths)]
        targets = [tokens(2 + at % 15, task) for at in range(len(lengths))]
        parts[f"task{task}"] = Part(draw(st.floats(0.05, 20)), make_examples(inputs, targets))
    return parts


batch_sizes = st.sampled_from([4, 8, 12])


def members(batches, batch):
    """Task and place of each row, by its id."""
    starts = [*batches.starts.values()]
    return [(task := int(np.searchsorted(starts, at, "right")) - 1, int(at - starts[task])) for at in batch.ids]


@settings(max_examples=15)
@given(mixtures(), batch_sizes, seeds, st.integers(0, 2))
def test_a_window_has_every_task_by_rate_and_every_example_as_often_as_any(parts, batch_size, seed, windows):
    batches = MixedBatches(parts, batch_size, LENGTHS, seed=seed)
    number = (windows + 1) * batches.window
    seen = collections.Counter()
    for step in range(number):
        batch = batches[step]
        assert (batch.ids >= 0).all() and batch.inputs.shape[0] == batch_size
        seen.update(members(batches, batch))
    total = sum(part.rate for part in parts.values())
    for task, part in enumerate(parts.values()):
        visits = [seen[task, at] for at in range(len(part.examples))]
        assert abs(sum(visits) - number * batch_size * part.rate / total) < 1 + len(parts)
        assert max(visits) - min(visits) <= 1, "no example is visited again before all others of its task were"
    assert batches.examples_before(number) == number * batch_size == seen.total()


@given(mixtures(), batch_sizes, seeds, st.integers(0, 10_000))
def test_a_row_is_the_example_of_its_id(parts, batch_size, seed, number):
    batches = MixedBatches(parts, batch_size, LENGTHS, seed=seed)
    batch = batches[number]
    examples = [part.examples for part in parts.values()]
    for at, (task, place) in enumerate(members(batches, batch)):
        assert tuple(batch.inputs[at, :2]) == (task + 2, place + 2)
        targets = examples[task].targets[place][: LENGTHS["targets"] - 1]
        np.testing.assert_array_equal(batch.targets[at, : len(targets) - 1], targets[:-1])


@given(mixtures(), batch_sizes, seeds, st.lists(st.integers(0, 1_000), min_size=1, max_size=5))
def test_a_batch_depends_on_seed_and_number_alone(parts, batch_size, seed, numbers):
    wandering = MixedBatches(parts, batch_size, LENGTHS, seed=seed)
    for number in numbers:
        assert_equal(wandering[number], MixedBatches(parts, batch_size, LENGTHS, seed=seed)[number])


@settings(max_examples=8)
@given(mixtures(), batch_sizes, seeds, st.integers(0, 200), st.integers(0, 12))
def test_reading_may_start_anywhere(parts, batch_size, seed, start, count):
    batches = MixedBatches(parts, batch_size, LENGTHS, seed=seed)
    read = list(MixedBatches(parts, batch_size, LENGTHS, seed=seed).start_at(start, start + count))
    assert len(read) == count
    for offset, batch in enumerate(read):
        assert_equal(batch, batches[start + offset])


@given(mixtures(), batch_sizes, seeds, st.integers(0, 300), st.sampled_from([1, 2, 4]))
def test_processes_share_the_batches_of_one(parts, batch_size, seed, number, count):
    whole = MixedBatches(parts, batch_size, LENGTHS, seed=seed)[number]
    shares = [
        MixedBatches(parts, batch_size, LENGTHS, seed=seed, process_index=index, process_count=count)[number]
        for index in range(count)
    ]
    assert_equal(whole, joined(shares))


def test_batches_hold_examples_of_about_the_same_length():
    """Of two tasks, one of short and one of long inputs, hardly a short one is padded to a long one's length."""
    parts = {
        "short": Part(1.0, make_examples([tokens(6, i) for i in range(50)], [tokens(3, i) for i in range(50)])),
        "long": Part(1.0, make_examples([tokens(39, i) for i in range(50)], [tokens(3, i) for i in range(50)])),
    }
    batches = MixedBatches(parts, 8, LENGTHS)
    widths = collections.Counter(batches[number].inputs.shape[1] for number in range(batches.window))
    assert widths == {16: batches.window // 2, 40: batches.window // 2}
    order = [batches[number].inputs.shape[1] for number in range(batches.window)]
    assert order != sorted(order), "short and long batches come mixed"


MODULE = """
import functools, seqio, tensorflow as tf
from prompt_tuning_jax.tasks import metrics, postprocessors
from prompt_tuning_jax.tasks.register import FEATURES

def add(name, splits, metric=True):
    def rows(split, shuffle_files, seed=None):
        texts = [f"{name} {split} film {i}" for i in range(splits[split])]
        targets = [("good", "bad")[i % 2] for i in range(splits[split])]
        return tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": targets})
    seqio.TaskRegistry.add(name, source=seqio.FunctionDataSource(rows, splits=tuple(splits)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features=FEATURES,
        postprocess_fn=functools.partial(postprocessors.label_index, labels=("good", "bad")) if metric else None,
        metric_fns=[metrics.accuracy, metrics.f1] if metric else [])

add("one", {"train": 30, "validation": 4})
add("two", {"train": 10})
add("three", {"train": 5, "dev_only": 3, "validation": 6})
add("four", {"dev_only": 3}, metric=False)
seqio.MixtureRegistry.add("inner", [("one", 3.0), ("two", 1.0)])
seqio.MixtureRegistry.add("outer", [("inner", 8.0), ("three", 0.0), ("four", 1.0)])
seqio.MixtureRegistry.add("resting", [("three", 0.0), ("four", 1.0)])
"""


@pytest.fixture
def in_process(monkeypatch):
    """Builds in this process, for speed; what it was asked for."""
    orders = []

    def start(module, order, what, pipe):
        orders.append(order)
        build_missing(
            TaskRequest.from_json(order["request"]),
            order["split"],
            cache_module.Path(order["cache_dir"]),
            order["to_train"],
        )
        return SimpleNamespace(stdout=[], finish=lambda: None)

    monkeypatch.setattr(cache_module, "Child", start)
    return orders


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory, forget_tasks):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_mixtures.py").write_text(MODULE)
    return folder


def config(tmp_path, name="outer", split="train", **changed):
    given = {"module": "own_mixtures", "cache_dir": str(tmp_path / "cache")} | changed
    return DatasetConfig(name, split, 4, TINY_LENGTHS, **given)


def test_a_mixture_trains_on_its_tasks_by_rate_and_evaluates_each(
    tiny, tmp_path, own_tasks, in_process, monkeypatch, capfd
):
    """`inner` is drawn 3 to 1; `three` never, but it is evaluated; `four` and `two` have no such split."""
    monkeypatch.syspath_prepend(own_tasks)
    words = Vocabulary(tiny.vocabulary)
    batches = config(tmp_path).batches(words, seed=1, shuffle=True)
    assert isinstance(batches, MixedBatches)
    assert {task: len(part.examples) for task, part in batches.parts.items()} == {"one": 30, "two": 10}
    drawn = collections.Counter(task for number in range(64) for task, _ in members(batches, batches[number]))
    assert abs(drawn[0] / drawn.total() - 0.75) < 0.01
    said = capfd.readouterr().err + "".join(json.dumps(order) for order in in_process)
    assert len(in_process) == 1, "all its tasks are tokenised by one process"
    cached = {path.name.rpartition("-")[0] for path in (tmp_path / "cache").iterdir()} - {""}
    assert cached == {"one", "two"}, said

    tasks = config(tmp_path, split="validation").eval_batches(words)
    assert {name: len(part.examples) for name, part in tasks.items()} == {"one": 4, "three": 6}
    assert all(score(part.examples, ["good"] * len(part.examples))["accuracy"] == 50 for part in tasks.values())
    sliced = config(tmp_path, split="validation[:2]").eval_batches(words)
    assert {name: len(part.examples) for name, part in sliced.items()} == {"one": 2, "three": 2}
    assert len(in_process) == 2

    alone = config(tmp_path, name="inner", split="train[:3]").batches(words)
    assert [len(part.examples) for part in alone.parts.values()] == [3, 3]
    one = config(tmp_path, name="one").batches(words)
    assert isinstance(one, Batches) and len(one.examples) == 30
    assert len(in_process) == 4, "the tasks are in the cache; what the two names hold is not"
    assert [*config(tmp_path, name="one", split="validation").eval_batches(words)] == ["one"]


@pytest.mark.parametrize(
    "name, split, message",
    [
        ("outer", "test", "outer has no split 'test', only dev_only, train, validation: set `train` or `validation`"),
        ("resting", "train", "every task of resting that has the split 'train' has mixing rate 0: set `name`"),
        (
            "outer",
            "train[10:]",
            r"split 'train\[10:\]' of two is empty: set `train` or `validation` to a split with rows",
        ),
        ("outr", "train", "no task 'outr'; did you mean 'outer'"),
    ],
)
def test_a_mixture_that_cannot_be_trained_on(tiny, tmp_path, own_tasks, in_process, monkeypatch, name, split, message):
    monkeypatch.syspath_prepend(own_tasks)
    with pytest.raises(ValueError, match=message):
        config(tmp_path, name, split).batches(Vocabulary(tiny.vocabulary))


def test_the_score_is_the_mean_of_the_tasks_scores():
    """Not of all metrics: a task with two of them counts no more than one with one."""
    head = {"step": 3, "split": "eval", "seconds": 9.0}
    assert record_score(head | {"accuracy": 80.0, "f1": 60.0}) == 70
    assert record_score(head | {"a/accuracy": 80.0, "a/f1": 60.0, "b/accuracy": 30.0}) == 50
    assert record_score(head | {"loss": 2.0, "token_accuracy": 90.0}) == -2
    assert record_score(head | {"a/loss": 2.0, "a/encoder_use": 1.0, "b/loss": 4.0}) == -3
    assert record_score(head | {"a/loss": 2.0, "b/accuracy": 30.0}) == 30, "a loss is no part of a score"


def test_a_run_on_a_mixture_records_every_task(tiny, tmp_path, own_tasks):
    macros = {"MIXTURE_OR_TASK_NAME": "outer", "MIXTURE_OR_TASK_MODULE": "own_mixtures", "EVAL_SPLIT": "validation"}
    arguments = tiny.arguments(**macros, TRAIN_STEPS=4, EVAL_PERIOD=2, LOG_PERIOD=2, MODEL_DIR=str(tmp_path / "run"))
    done = subprocess.run(
        [sys.executable, "-m", "prompt_tuning_jax.train", *arguments],
        env=os.environ | tiny.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{own_tasks}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["split"] == "eval":
            assert {*record} == {
                "step", "split", "seconds", "one/accuracy", "one/f1", "three/accuracy", "three/f1",
            }  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "outer" and {*summary["best"]} == {*record} - {"step", "split", "seconds"}
    assert summary["examples_seen"] == 4 * 8


def test_a_mixture_leaves_a_prompt_for_each_of_its_tasks(tiny, tmp_path, own_tasks):
    """By gin files alone, with what `inner` holds named in TASKS; other names are one line, which lists them."""
    macros = {"MIXTURE_OR_TASK_NAME": "inner", "MIXTURE_OR_TASK_MODULE": "own_mixtures", "EVAL_SPLIT": "validation"}
    macros |= {"TRAIN_STEPS": 4, "EVAL_PERIOD": 2, "PROMPT_LENGTH": 3, "MODEL_DIR": str(tmp_path / "run")}
    files = ("prompts/sampled_vocabulary.gin", "methods/mpt.gin")

    def command(**more):
        return subprocess.run(
            [sys.executable, "-m", "prompt_tuning_jax.train", *tiny.arguments(*files, **(macros | more))],
            env=os.environ | tiny.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{own_tasks}"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    refused = command(TASKS=["one", "three"])
    assert refused.returncode == 2
    *_, last = refused.stderr.splitlines(keepends=True)  # after what the data check says
    assert last == "error: TASKS has one, three, but the training data has the tasks one, two: set TASKS to these\n"
    assert not (tmp_path / "run").exists()
    done = command(TASKS=["one", "two"])
    assert done.returncode == 0, done.stderr
    prompts = {task: np.load(tmp_path / "run" / "best" / "prompts" / f"{task}.npy") for task in ("one", "two")}
    starts = {task: np.load(tmp_path / "run" / "prompts" / "0" / f"{task}.npy") for task in prompts}
    np.testing.assert_array_equal(starts["one"], starts["two"])
    assert all(np.abs(prompts[task] - starts[task]).max() > 0.1 for task in prompts)
    assert np.abs(prompts["one"] - prompts["two"]).max() > 0.1

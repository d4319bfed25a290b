"""The cache of tokenised splits: what is in it, what scores it, when it is made again, and that reading it is light."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import LENGTHS, ROOT, make_tiny, train_vocabulary

from prompt_tuning_jax.batches.build import build_split, find_task
from prompt_tuning_jax.batches.cache import Examples, TaskRequest, load_split
from prompt_tuning_jax.tasks import review_grammar, sources
from prompt_tuning_jax.tasks.vocabularies import trim

TEXT_LENGTHS = {"inputs": 24, "targets": 12}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def demo(tiny):
    """The demo's validation split, tokenised by the process that `load_split` starts."""
    return load_split(tiny.demo, "validation", tiny.folder / "cache" / "tasks")


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):
    """A folder of plain text as a request for span corruption."""
    folder = tmp_path_factory.mktemp("text")
    lines = [" ".join(s.text for s in review_grammar.sentences("train")[i : i + 3]) for i in range(0, 60, 3)]
    (folder / "a.txt").write_text("\n".join(lines * 4) + "\n")
    return TaskRequest("text_span_corruption", str(tiny.vocabulary), TEXT_LENGTHS, str(folder))


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def sst2_folder(folder: Path, count: int) -> Path:
    (folder / "SST-2").mkdir(parents=True)
    lines = ["sentence\tlabel", *(f"the plot was dull {i} \t{i % 2}" for i in range(count))]
    (folder / "SST-2" / "train.tsv").write_text("\n".join(lines) + "\n")
    return folder


def assert_is_seqios(examples: Examples, request: TaskRequest, split: str) -> None:
    """Token for token and field for field what SeqIO gives for this task, once a batch has cut it."""
    sources.set_data_dir(request.data_dir)
    lengths = dict(request.feature_lengths)
    expected = list(find_task(request).get_dataset(lengths, split, shuffle=False, seed=0).as_numpy_iterator())
    assert len(examples) == len(expected) > 0
    for row, (example, fields) in enumerate(zip(expected, examples.fields, strict=True)):
        np.testing.assert_array_equal(trim(examples.inputs[row], lengths["inputs"]), example.pop("inputs"))
        np.testing.assert_array_equal(trim(examples.targets[row], lengths["targets"]), example.pop("targets"))
        assert fields == {k: v.decode() if isinstance(v, bytes) else v for k, v in example.items()}


def test_what_is_cached_is_what_seqio_gives(tiny, demo):
    assert_is_seqios(demo, tiny.demo, "validation")
    assert demo.fields[0]["inputs_pretokenized"] == f"sentence: {review_grammar.sentences('validation')[0].text}"
    assert demo.labels == ("negative", "positive")


def test_pretraining_examples_are_what_seqio_gives(text, tmp_path):
    build_split(text, "train", tmp_path / "train")
    examples = Examples(tmp_path / "train", slice(None))
    assert_is_seqios(examples, text, "train")
    assert examples.cut(TEXT_LENGTHS) == {"inputs": 0, "targets": 0}
    assert examples.metrics == [] and examples.labels is None


def test_no_token_is_cut_before_it_is_counted(demo):
    """TASK_FEATURE_LENGTHS cuts when a batch is made, so that a user is told of how many."""
    longest = int(demo.inputs.lengths.max())
    assert longest > LENGTHS["inputs"]
    assert demo.cut({"inputs": longest, "targets": 4}) == {"inputs": 0, "targets": 0}
    assert demo.cut({"inputs": longest - 1, "targets": 1}) == {
        "inputs": int((demo.inputs.lengths == longest).sum()),
        "targets": 500,
    }


@pytest.mark.parametrize("start, stop", [(None, 10), (490, None), (-7, None), (3, -490)])
def test_a_slice_is_its_rows(tiny, demo, start, stop):
    rows, text = slice(start, stop), "".join(str(end or "") + mark for end, mark in ((start, ":"), (stop, "")))
    part = load_split(tiny.demo, f"validation[{text}]", tiny.folder / "cache" / "tasks")
    assert list(part.rows) == list(range(500)[rows])
    assert part.fields == demo.fields[rows]
    answers = [fields["targets_pretokenized"] for fields in demo.fields[rows]]
    assert part.score(answers) == {"accuracy": 100.0}
    assert part.cut(LENGTHS)["inputs"] == int((demo.inputs.lengths[rows] > LENGTHS["inputs"]).sum())


@pytest.mark.parametrize(
    "split, message",
    [
        ("validation[500:]", r"split 'validation\[500:\]' of demo_reviews is empty: set TRAIN_SPLIT and EVAL_SPLIT"),
        ("validation[:10%]", r"split 'validation\[:10%\]', expected .* slice such as train\[:-2000\]: set TRAIN_SPLIT"),
    ],
)
def test_a_slice_of_nothing_is_refused(tiny, demo, split, message):
    with pytest.raises(ValueError, match=message):
        load_split(tiny.demo, split, tiny.folder / "cache" / "tasks")


def test_answers_are_scored_by_the_tasks_own_metric(demo):
    right = [fields["targets_pretokenized"] for fields in demo.fields]
    wrong = [{"negative": "positive", "positive": "negative"}[text] for text in right]
    assert demo.score(right) == {"accuracy": 100.0}
    assert demo.score(wrong) == demo.score(["no label"] * 500) == demo.score([""] * 500) == {"accuracy": 0.0}
    assert demo.score([*right[:125], *wrong[125:]]) == {"accuracy": 25.0}


def test_builders_at_the_same_time_leave_one_whole_split(text, tmp_path):
    folder = tmp_path / "task" / "train"
    barrier, failed = threading.Barrier(3), []

    def build():
        barrier.wait()
        try:
            build_split(text, "train", folder)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert os.listdir(folder.parent) == ["train"]
    assert len(Examples(folder, slice(None))) > 100


def test_a_builder_that_was_killed_leaves_nothing_that_is_read(tiny, tmp_path):
    request = TaskRequest("glue_sst2_v200", str(tiny.vocabulary), LENGTHS, str(sst2_folder(tmp_path / "data", 6_000)))
    root = tmp_path / "cache" / f"glue_sst2_v200-{request.fingerprint()}"
    order = json.dumps(dataclasses.asdict(request) | {"split": "train", "folder": str(root / "train")})
    builder = subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning_jax.batches.build", order],
        env=os.environ | tiny.environment,
        stderr=subprocess.DEVNULL,
    )
    while not list(root.glob(".train-*/fields.jsonl")):
        assert builder.poll() is None, "the builder ended before it could be killed"
        time.sleep(0.001)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert not (root / "train").exists()

    # What a copy that was cut short leaves is no cache either.
    shutil.copytree(next(root.glob(".train-*")), root / "train")
    assert not (root / "train" / "task.json").exists()
    assert len(load_split(request, "train", tmp_path / "cache")) == 6_000


def test_what_decides_the_tokens_decides_the_cache(tiny, tmp_path):
    data = sst2_folder(tmp_path / "data", 3)
    request = TaskRequest("glue_sst2_v200", str(tiny.vocabulary), LENGTHS, str(data))
    first = request.fingerprint()
    assert dataclasses.replace(request).fingerprint() == first

    other = tmp_path / "other.model"
    other.write_bytes(train_vocabulary(pieces=250))
    same = tmp_path / "same.model"
    same.write_bytes(tiny.vocabulary.read_bytes())
    assert dataclasses.replace(request, vocabulary=str(same)).fingerprint() == first
    changed = [
        dataclasses.replace(request, vocabulary=str(other)),
        dataclasses.replace(request, name="taskless_glue_sst2_v200"),
        dataclasses.replace(request, feature_lengths={"inputs": 47, "targets": 8}),
        dataclasses.replace(request, modules=("a_module",)),
        dataclasses.replace(request, data_dir=None),
    ]
    fingerprints = {first, *(each.fingerprint() for each in changed)}
    assert len(fingerprints) == 1 + len(changed)

    tsv = data / "SST-2" / "train.tsv"
    tsv.write_text(tsv.read_text().replace("dull 2", "good 2"))  # of the same size
    second = request.fingerprint()
    (data / "SST-2" / "dev.tsv").write_text(tsv.read_text())
    assert len({*fingerprints, second, request.fingerprint()}) == 3 + len(changed)


def test_a_changed_task_is_tokenised_again(tiny, tmp_path):
    """Whether the task is this project's own or in a module of the user's."""
    shutil.copytree(ROOT / "prompt_tuning_jax", tmp_path / "prompt_tuning_jax")
    (tmp_path / "own").mkdir()
    module = tmp_path / "own" / "tasks.py"
    module.write_text("first = 1\n")
    source = (
        "from prompt_tuning_jax.batches.cache import TaskRequest as R\n"
        f"print(R('demo_reviews', {str(tiny.vocabulary)!r}, {LENGTHS}, modules=('own.tasks',)).fingerprint())"
    )

    def fingerprint():
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, "-c", source], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    module.write_text("first = 2\n")
    seen.append(fingerprint())
    with open(tmp_path / "prompt_tuning_jax" / "tasks" / "preprocessors.py", "a") as file:
        file.write("\n# changed\n")
    seen.append(fingerprint())
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"name": "taskless_glue_sts2_v200"},
            "no task 'taskless_glue_sts2_v200'; did you mean 'taskless_glue_sst2_v200'",
        ),
        ({"name": "zzz"}, "no task 'zzz'; there are demo_reviews, .*text_span_corruption.*Set MIXTURE_OR_TASK_NAME"),
        ({"modules": ("own_tasks",)}, "no module own_tasks: set MIXTURE_OR_TASK_MODULE to one that Python finds"),
        ({"modules": ("prompt_tuning_jax.taks",)}, "no module prompt_tuning_jax.taks: set MIXTURE_OR_TASK_MODULE"),
    ],
)
def test_a_task_that_is_not_there_is_named_with_its_near_misses(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        find_task(dataclasses.replace(tiny.demo, **change))


def test_a_split_that_is_not_there_is_named_with_those_that_are(tiny, tmp_path):
    message = "demo_reviews has no split 'test', only train, validation, unseen_words: set TRAIN_SPLIT or EVAL_SPLIT"
    with pytest.raises(ValueError, match=message):
        build_split(tiny.demo, "test", tmp_path / "task" / "test")
    assert not os.listdir(tmp_path)


def test_a_module_of_the_users_own_registers_tasks(tiny, tmp_path, monkeypatch):
    """Its postprocessor and metric score the cache, options and all."""
    (tmp_path / "own_reviews.py").write_text(
        "import functools, seqio, tensorflow as tf\n"
        "from prompt_tuning_jax.tasks.features import FEATURES\n"
        "def count(targets, predictions, *, weight):\n"
        "    return {'matches': weight * float(sum(t == p for t, p in zip(targets, predictions)))}\n"
        "def shout(text, example=None, is_target=False, *, mark):\n"
        "    return text.upper() + mark + str(example['row'])\n"
        "def rows(split, shuffle_files, seed=None):\n"
        "    rows = {'inputs': ['a film', 'a bore'], 'targets': ['good', 'bad'], 'row': [7, 8]}\n"
        "    return tf.data.Dataset.from_tensor_slices(rows)\n"
        "seqio.TaskRegistry.add('own_reviews', source=seqio.FunctionDataSource(rows, splits=('train',)),\n"
        "    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],\n"
        "    output_features=FEATURES, postprocess_fn=functools.partial(shout, mark='!'),\n"
        "    metric_fns=[functools.partial(count, weight=10)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    request = TaskRequest("own_reviews", str(tiny.vocabulary), LENGTHS, None, ("own_reviews",))
    build_split(request, "train", tmp_path / "cache" / "train")
    examples = Examples(tmp_path / "cache" / "train", slice(None))
    assert [fields["row"] for fields in examples.fields] == [7, 8]
    assert examples.postprocess("good", example={"row": 3}) == "GOOD!3"
    assert examples.score(["good", "good"]) == {"matches": 10}


def imported(source: str, tiny) -> set[str]:
    """The top-level modules that a program has imported when it ends."""
    source += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | tiny.environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch", "transformers"}


def test_reading_and_scoring_a_cache_imports_no_tensorflow(tiny, demo):
    source = (
        "from prompt_tuning_jax.batches.cache import TaskRequest, load_split\n"
        f"examples = load_split(TaskRequest('demo_reviews', {str(tiny.vocabulary)!r}, {LENGTHS}), 'validation')\n"
        "assert examples.score(['positive'] * 500) == {'accuracy': 50.0}, examples.score(['positive'] * 500)"
    )
    assert not imported(source, tiny) & HEAVY


def test_the_command_line_starts_without_tensorflow(tiny):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import prompt_tuning_jax.train"],
        env=os.environ | tiny.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "prompt_tuning_jax" in names
    assert not names & HEAVY

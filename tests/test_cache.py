"""Tests the cache of tokenised splits: its contents, its metrics, when it is rebuilt, and that reading it is cheap."""

import contextlib
import dataclasses
import errno
import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from cached import load_split, score
from tiny import LENGTHS, ROOT, train_vocabulary

from prompt_tuning_jax.batches import build
from prompt_tuning_jax.batches import cache as cache_module
from prompt_tuning_jax.batches.build import build_missing, build_split, find_task
from prompt_tuning_jax.batches.cache import CachedExamples, TaskRequest, names_path, open_current, split_folder
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.lock import DEAD_AFTER, lock
from prompt_tuning_jax.batches.stream import stream
from prompt_tuning_jax.tasks import review_grammar, sources
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary, trim

TEXT_LENGTHS = {"inputs": 24, "targets": 12}


@pytest.fixture(scope="module")
def demo(tiny):
    """Returns the demo's validation split, tokenised by the process that `load_tasks` starts."""
    return load_split(tiny.demo, "validation", tiny.folder / "cache" / "tasks")


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):
    """Returns a request for span corruption of a folder of plain text."""
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


def assert_is_seqios(examples: CachedExamples, request: TaskRequest, split: str) -> None:
    """Checks that truncated tokens and all fields are those that SeqIO gives for this task."""
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
    assert answers(demo.postprocess) == ("negative", "positive")


def test_pretraining_examples_are_what_seqio_gives(text, tmp_path):
    build_split(text, "train", tmp_path / "train")
    examples = CachedExamples(tmp_path / "train", slice(None))
    assert_is_seqios(examples, text, "train")
    assert examples.count_truncated(TEXT_LENGTHS) == {"inputs": 0, "targets": 0}
    assert examples.metrics == [] and answers(examples.postprocess) is None


def test_no_token_is_cut_before_it_is_counted(demo):
    """TASK_FEATURE_LENGTHS truncates when a batch is made, so that truncated examples can be counted and reported."""
    longest = int(demo.inputs.lengths.max())
    assert longest > LENGTHS["inputs"]
    assert demo.count_truncated({"inputs": longest, "targets": 4}) == {"inputs": 0, "targets": 0}
    assert demo.count_truncated({"inputs": longest - 1, "targets": 1}) == {
        "inputs": int((demo.inputs.lengths == longest).sum()),
        "targets": 500,
    }


@pytest.mark.parametrize("start, stop", [(None, 10), (490, None), (-7, None), (3, -490)])
def test_a_slice_is_its_rows(tiny, demo, start, stop):
    rows, text = slice(start, stop), "".join(str(end or "") + mark for end, mark in ((start, ":"), (stop, "")))
    part = load_split(tiny.demo, f"validation[{text}]", tiny.folder / "cache" / "tasks")
    assert list(part.rows) == list(range(500)[rows])
    assert part.fields == demo.fields[rows]
    right = [fields["targets_pretokenized"] for fields in demo.fields[rows]]
    assert score(part, right) == {"accuracy": 100.0}
    assert part.count_truncated(LENGTHS)["inputs"] == int((demo.inputs.lengths[rows] > LENGTHS["inputs"]).sum())


@pytest.mark.parametrize(
    "split, message",
    [
        ("validation[500:]", r"split 'validation\[500:\]' of demo_reviews is empty: set `train` or `validation` to"),
        ("validation[:10%]", r"split 'validation\[:10%\]', expected .* slice such as train\[:-2000\]: set `train` or"),
    ],
)
def test_a_slice_of_nothing_is_refused(tiny, demo, split, message):
    with pytest.raises(ValueError, match=message):
        load_split(tiny.demo, split, tiny.folder / "cache" / "tasks")


def test_answers_are_scored_by_the_tasks_own_metric(demo):
    right = [fields["targets_pretokenized"] for fields in demo.fields]
    wrong = [{"negative": "positive", "positive": "negative"}[text] for text in right]
    assert score(demo, right) == {"accuracy": 100.0}
    assert score(demo, wrong) == score(demo, ["no label"] * 500) == score(demo, [""] * 500) == {"accuracy": 0.0}
    assert score(demo, [*right[:125], *wrong[125:]]) == {"accuracy": 25.0}


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
    assert len(CachedExamples(folder, slice(None))) > 100


def start_builder(tiny, request, split, cache, before="", **options):
    """Starts the process that `load_tasks` starts, with the statements `before` first; its stdin must stay open."""
    order = json.dumps(request.to_child_request(split=split, cache_dir=str(cache), to_train=True, then=[]))
    program = (
        f"import sys; sys.argv[1:] = [{order!r}]; {before}\nfrom prompt_tuning_jax.batches import build; build.main()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-c", program], env=os.environ | tiny.environment, **pipes)


def finish(builder):
    """Waits for a builder, with its stdin open, and returns its exit code, stdout and stderr."""
    builder.wait(timeout=120)
    stdout, stderr = builder.communicate()
    return builder.returncode, stdout, stderr


def sst2(tiny, folder, count):
    return TaskRequest("glue_sst2_v200", str(tiny.vocabulary), LENGTHS, str(sst2_folder(folder, count)))


def files_of(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


def test_a_builder_that_was_killed_leaves_nothing_that_is_read(tiny, tmp_path):
    request, cache = sst2(tiny, tmp_path / "data", 6_000), tmp_path / "cache"
    root = split_folder(request, request.name, "train", cache).parent
    builder = start_builder(tiny, request, "train", cache)
    while not list(root.glob(".train-*/fields.jsonl")):
        assert builder.poll() is None, "the builder ended before it could be killed"
        time.sleep(0.001)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert not (root / "train").exists()
    assert (root / ".train.lock").exists()

    # What an interrupted copy leaves is not a cache either, and a dead builder is not waited for.
    shutil.copytree(next(root.glob(".train-*")), root / "train")
    started = time.monotonic()
    assert open_current(root / "train") is None
    build_missing(request, "train", cache, True)
    assert time.monotonic() - started < DEAD_AFTER
    assert len(load_split(request, "train", cache)) == 6_000
    assert not (root / ".train.lock").exists()


def test_a_builder_ends_with_the_process_that_started_it(tiny, tmp_path):
    """However the process ends, its end of a pipe is then closed."""
    builder = start_builder(tiny, sst2(tiny, tmp_path / "data", 10), "train", tmp_path / "cache", "import time")
    builder.stdin.close()
    assert builder.wait(timeout=60) == 1
    builder.stdin = None
    builder.communicate()
    assert not (tmp_path / "cache").exists()


def test_of_two_processes_one_builds_and_one_waits(tiny, tmp_path):
    request, cache = sst2(tiny, tmp_path / "data", 3_000), tmp_path / "cache"
    done = [finish(builder) for builder in [start_builder(tiny, request, "train", cache) for _ in range(2)]]
    assert [code for code, _, _ in done] == [0, 0], done
    said = "".join(stdout for _, stdout, _ in done)
    assert said.count("tokenising glue_sst2_v200, train") == 1
    assert len(load_split(request, "train", cache)) == 3_000
    assert not [name for name in files_of(cache) if "/." in name]


def test_who_waits_says_for_whom(tiny, tmp_path, capsys):
    request, cache = sst2(tiny, tmp_path / "data", 10), tmp_path / "cache"
    folder = split_folder(request, request.name, "train", cache)
    folder.parent.mkdir(parents=True)
    builder = threading.Thread(target=build_missing, args=(request, "train", cache, True))
    line, deadline = "", time.monotonic() + 60
    with lock(folder.with_name(".train.lock")):
        builder.start()
        while not line.endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
            line += capsys.readouterr().out
        assert line == (
            f"waiting for process {os.getpid()} on {socket.gethostname()}, which tokenises glue_sst2_v200, train\n"
        )
        assert not folder.exists()
    builder.join()
    assert folder.exists()


@contextlib.contextmanager
def limited(size):
    """Limits the size of the files that this process writes, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def half(path, array):
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def short(path, array):
    with open(path, "wb") as file:
        array.tofile(file)
        file.truncate(9)
    with open("/dev/full", "wb", buffering=0) as file:
        array.tofile(file)


def saved_by(save):
    return lambda: mock.patch.object(np, "save", save)


# 3,000 rows: the fields have over 400,000 bytes, the tokens over 60,000, the ends 24,000.
@pytest.mark.parametrize(
    "full, reason",
    [
        pytest.param(lambda: limited(100_000), "File too large", id="fields"),
        pytest.param(saved_by(half), "No space left on device", id="arrays"),
        pytest.param(saved_by(short), r".* requested and 0 written", id="arrays, by NumPy's own error"),
    ],
)
def test_a_disk_that_fills_is_cleaned_up_and_said(tiny, tmp_path, full, reason):
    request, cache = sst2(tiny, tmp_path / "data", 3_000), tmp_path / "cache"
    folder = split_folder(request, request.name, "train", cache).parent
    message = rf"^no room for the cache {folder} \({reason}\): free some, or set `cache_dir` to a disk that has it$"
    with full(), pytest.raises(ValueError, match=message):
        build_missing(request, "train", cache, True)
    assert files_of(cache) == [] and not folder.exists()


def test_what_decides_the_tokens_decides_the_cache(tiny, tmp_path):
    (tmp_path / "data").mkdir()
    request = TaskRequest("glue_sst2_v200", str(tiny.vocabulary), LENGTHS, str(tmp_path / "data"))
    first = request.fingerprint()
    assert dataclasses.replace(request).fingerprint() == first
    assert dataclasses.replace(request, data_dir=f"{tmp_path}/./data/").fingerprint() == first

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
    assert len({first, *(each.fingerprint() for each in changed)}) == 1 + len(changed)


@pytest.fixture
def built_here(monkeypatch):
    """Makes `load_tasks` tokenise in this process, and returns a list to which each module it would start is added."""
    started = []

    def start(module, order, what, pipe):
        assert pipe
        started.append(module)
        request = TaskRequest.from_json(order["request"])
        for split in (order["split"], *order["then"]):
            build_missing(request, split, Path(order["cache_dir"]), order["to_train"])
        return SimpleNamespace(stdout=[], finish=lambda: None)

    monkeypatch.setattr(cache_module, "Child", start)
    return started


def test_one_process_tokenises_the_rows_to_train_on_and_to_score(tiny, tmp_path, built_here):
    """If both are of one task in one cache. A split that the task lacks is the same error in either place."""
    request = sst2(tiny, tmp_path / "data", 3)
    shutil.copy(tmp_path / "data" / "SST-2" / "train.tsv", tmp_path / "data" / "SST-2" / "dev.tsv")
    train = DatasetConfig(
        request.name, "train", 2, request.feature_lengths, data_dir=request.data_dir, cache_dir=str(tmp_path / "cache")
    )
    words = Vocabulary(request.vocabulary)
    kinds = {
        "same": dataclasses.replace(train, split="validation[:2]"),
        "lengths": dataclasses.replace(train, split="validation", task_feature_lengths={"inputs": 9, "targets": 8}),
        "cache": dataclasses.replace(train, split="validation", cache_dir=str(tmp_path / "other")),
        "several": DatasetConfig("all", "validation", 2, request.feature_lengths, tasks={"one": train}),
        "none": None,
    }
    found = {kind: train._splits_of(dataset, words) for kind, dataset in kinds.items()}
    assert found == {"same": ["validation"], "lengths": [], "cache": [], "several": [], "none": []}

    train.batches(words, shuffle=True, then=kinds["same"])
    (rows,) = kinds["same"].eval_batches(words).values()
    assert len(rows.examples) == 2 and len(built_here) == 1
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="has no split 'dev', only train, validation"):
        train.batches(words, then=dataclasses.replace(train, split="dev"))


def test_the_process_tokenises_each_split_of_its_order(tiny, monkeypatch):
    calls = []
    order = tiny.demo.to_child_request(split="train", cache_dir="cache", to_train=True, then=["validation"])
    monkeypatch.setattr(sys, "argv", ["build", json.dumps(order)])
    monkeypatch.setattr(build, "build_missing", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(build, "end_with_parent", lambda: None)  # it would read this process's stdin
    build.main()
    cache = Path("cache")
    assert calls == [(tiny.demo, "train", cache, True), (tiny.demo, "validation", cache, False)]


def test_a_cache_is_of_the_files_that_its_task_read(tiny, tmp_path, built_here):
    """A change of one of these files rebuilds the cache. Other files under DATA_DIR are not read and change nothing."""
    request, cache = sst2(tiny, tmp_path / "data", 3), tmp_path / "cache"
    folder = split_folder(request, request.name, "train", cache)

    def made():
        load_split(request, "train", cache)
        return folder.stat().st_ino

    first = made()
    (tmp_path / "data" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na \t1\n")
    locked = tmp_path / "data" / "other"
    locked.mkdir()
    (locked / "big").write_text("not of this task")
    assert made() == first
    read = json.loads((folder / "task.json").read_text())["read"]
    assert list(read) == [str(tmp_path / "data" / "SST-2" / "train.tsv")]

    tsv = tmp_path / "data" / "SST-2" / "train.tsv"
    tsv.write_text(tsv.read_text().replace("dull 2", "good 2"))  # the size stays the same
    assert [fields["inputs_pretokenized"][-7:] for fields in load_split(request, "train", cache).fields] == [
        "dull 0 ", "dull 1 ", "good 2 ",
    ]  # fmt: skip
    assert folder.stat().st_ino != first


def test_a_file_more_in_a_folder_of_text_is_seen(text, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text.data_dir, folder)
    request = dataclasses.replace(text, data_dir=str(folder))
    build_split(request, "train", tmp_path / "cache" / "train")
    assert open_current(tmp_path / "cache" / "train")
    shutil.copy(folder / "a.txt", folder / "b.txt")
    assert open_current(tmp_path / "cache" / "train") is None


def ends_of(request, cache):
    """Returns the last two words of each row's sentence."""
    return [fields["inputs_pretokenized"].split()[-2:] for fields in load_split(request, "train", cache).fields]


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_out_of_data_dir_is_followed(tiny, tmp_path, built_here, link):
    """The rows are always the current ones, also if the file changes with the same size and time, or is replaced."""
    request, cache = sst2(tiny, tmp_path / "data", 2), tmp_path / "cache"
    inside = tmp_path / "data" / "SST-2"
    shutil.copytree(inside, tmp_path / "elsewhere")
    outside, other = tmp_path / "elsewhere" / "train.tsv", tmp_path / "another" / "train.tsv"
    if link == "file":
        (inside / "train.tsv").unlink()
        (inside / "train.tsv").symlink_to(outside)
    else:
        shutil.rmtree(inside)
        inside.symlink_to(outside.parent)
    assert ends_of(request, cache) == ends_of(request, cache) == [["dull", "0"], ["dull", "1"]]
    assert len(built_here) == 1

    before = outside.stat()
    outside.write_text(outside.read_text().replace("dull 1", "good 1"))
    os.utime(outside, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ends_of(request, cache) == [["dull", "0"], ["good", "1"]]

    shutil.copytree(outside.parent, other.parent)  # also copies the modification times
    other.write_text(other.read_text().replace("dull 0", "good 0"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    linked, target = (inside / "train.tsv", other) if link == "file" else (inside, other.parent)
    linked.unlink()
    linked.symlink_to(target)
    assert ends_of(request, cache) == [["good", "0"], ["good", "1"]]
    assert len(built_here) == 3
    other.unlink()
    with pytest.raises(ValueError, match="no SST-2/train.tsv under `data_dir`"):
        load_split(request, "train", cache)


def test_the_same_rows_in_a_newer_file_are_not_tokenised_again(tiny, tmp_path, built_here):
    """This is the case if each job copies its data to the disk of its machine."""
    request, cache = sst2(tiny, tmp_path / "data", 2), tmp_path / "cache"
    load_split(request, "train", cache)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "copy").rename(tmp_path / "data")
    load_split(request, "train", cache)
    assert len(built_here) == 1


def test_a_file_that_would_be_read_in_place_of_another_is_seen(tiny, tmp_path, built_here):
    """train.tsv is read in place of train.tsv.gz if both exist."""
    request, cache = sst2(tiny, tmp_path / "data", 2), tmp_path / "cache"
    path = tmp_path / "data" / "SST-2" / "train.tsv"
    path.with_suffix(".tsv.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert ends_of(request, cache) == [["dull", "0"], ["dull", "1"]]
    path.write_text("sentence\tlabel\nthe plot was good 7 \t1\n")
    assert ends_of(request, cache) == [["good", "7"]]
    assert len(built_here) == 2


def test_files_that_change_while_they_are_tokenised_leave_no_cache(tiny, tmp_path, monkeypatch):
    request, cache = sst2(tiny, tmp_path / "data", 2), tmp_path / "cache"
    path, write = tmp_path / "data" / "SST-2" / "train.tsv", build._write

    def slow(examples, *rest):
        path.write_text(path.read_text().replace("dull", "good"))  # after the rows were read, before they are tokenised
        write(examples, *rest)

    monkeypatch.setattr(build, "_write", slow)
    with pytest.raises(ValueError, match=f"^{path} changes while it is tokenised: start again when it rests$"):
        build_missing(request, "train", cache, True)
    assert not files_of(cache)


def test_the_hook_that_sees_opened_files_outlives_its_module(monkeypatch):
    """At exit, Python sets a module's names to None, and may still open files."""
    hooks = []
    monkeypatch.setattr(sys, "addaudithook", hooks.append)
    build._watch_opens.__wrapped__()
    for name in vars(build).copy():
        monkeypatch.setattr(build, name, None)
    hooks[0]("open", ("a_file", "r", 0))


def test_the_files_of_a_source_that_tensorflow_reads_are_seen(tiny, tmp_path, monkeypatch, built_here, forget_tasks):
    """For a task in the user's own module, changed and added files are seen, wherever they are."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").write_text("a film\n")
    (tmp_path / "lines_of_files.py").write_text(
        "import seqio\n"
        "from prompt_tuning_jax.tasks.register import FEATURES\n"
        f"source = seqio.TextLineDataSource({{'train': {str(tmp_path / 'rows' / '*.txt')!r}}})\n"
        "def split(lines):\n"
        "    return lines.map(lambda line: {'inputs': line, 'targets': 'good'})\n"
        "seqio.TaskRegistry.add('lines_of_files', source=source, output_features=FEATURES,\n"
        "    preprocessors=[split, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    request = TaskRequest("lines_of_files", str(tiny.vocabulary), LENGTHS, None, ("lines_of_files",))

    def texts():
        return [fields["inputs_pretokenized"] for fields in load_split(request, "train", tmp_path / "cache").fields]

    assert texts() == texts() == ["a film"]
    (tmp_path / "rows" / "a.txt").write_text("a bore\n")
    assert texts() == ["a bore"]
    (tmp_path / "rows" / "b.txt").write_text("a joy\n")
    # The rows are not loaded again, because SeqIO caches its list of files in this process.
    assert open_current(split_folder(request, request.name, "train", tmp_path / "cache")) is None
    assert len(built_here) == 2


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """Returns a request for three rows of SST-2, whose cache is beside the data folder."""
    folder = tmp_path_factory.mktemp("small")
    request = sst2(tiny, folder / "data", 3)
    build_missing(request, "train", folder / "cache", True)
    return request


@pytest.mark.parametrize(
    "name, damage",
    [
        ("train/task.json", b"{"),
        ("train/task.json", b"[]"),
        ("train/task.json", None),
        ("train/inputs.npy", b"half"),
        ("train/targets_ends.npy", None),
        ("train/fields.jsonl", b"{}\n"),
        ("names", b""),
        ("names", b"[1]"),
        ("names", b'{"glue_sst2_v200": {}}'),
        ("names", None),
    ],
)
def test_a_cache_that_is_not_whole_is_made_again(small, tmp_path, built_here, name, damage):
    request, cache = small, tmp_path / "cache"
    shutil.copytree(Path(request.data_dir).parent / "cache", cache)
    whole = {path: (cache / path).read_bytes() for path in files_of(cache)}
    path = names_path(request, cache)
    if name != "names":
        path = split_folder(request, request.name, "train", cache).parent / name
    path.unlink() if damage is None else path.write_bytes(damage)

    assert score(load_split(request, "train", cache), ["negative", "positive", "negative"]) == {"accuracy": 100.0}
    assert built_here == ["prompt_tuning_jax.batches.build"]
    assert {path: (cache / path).read_bytes() for path in files_of(cache)} == whole
    load_split(request, "train", cache)
    assert len(built_here) == 1


@pytest.mark.parametrize(
    "name", ["inputs.npy", "inputs_ends.npy", "targets.npy", "targets_ends.npy", "fields.jsonl", "task.json", "names"]
)
def test_one_flipped_bit_is_found_before_it_is_read(small, tmp_path, built_here, capsys, name):
    """Flips a bit at the start, middle and end of each file: the split is rebuilt each time, and a line says why."""
    request, cache = small, tmp_path / "cache"
    shutil.copytree(Path(request.data_dir).parent / "cache", cache)
    folder = split_folder(request, request.name, "train", cache)
    path = names_path(request, cache) if name == "names" else folder / name
    whole = path.read_bytes()
    for count, at in enumerate((0, len(whole) // 2, len(whole) - 2)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        load_split(request, "train", cache)
        assert path.read_bytes() == whole and len(built_here) == 1 + count
        whys = [f"its {name}"]
        if name == "task.json" or (name.endswith(".npy") and count < 2):  # an unreadable file is found without a hash
            whys.append("it")
        start, end = f"tokenising {request.name}, train again, since ", f" is damaged (once; kept in {folder})\n"
        assert capsys.readouterr().out in ([""] if name == "names" else [start + why + end for why in whys])


def test_ids_beyond_the_vocabulary_in_a_cache_are_found(small, tmp_path, built_here):
    request, cache = small, tmp_path / "cache"
    shutil.copytree(Path(request.data_dir).parent / "cache", cache)
    path = split_folder(request, request.name, "train", cache) / "inputs.npy"
    tokens = np.load(path)
    np.save(path, np.full_like(tokens, 2**31 - 1))
    np.testing.assert_array_equal(load_split(request, "train", cache).inputs.part(np.arange(3)).flat, tokens)
    assert len(built_here) == 1


def test_a_builder_that_fails_says_why(tiny, tmp_path, monkeypatch):
    """A user's error is one line, a kill names the signal, and any other error has its traceback."""
    with pytest.raises(ValueError, match=r"^no task 'demo_review'; did you mean 'demo_reviews'"):
        load_split(dataclasses.replace(tiny.demo, name="demo_review"), "train", tmp_path)
    order = tiny.demo.to_child_request(split="train", cache_dir=str(tmp_path), to_train=True, then=[])
    child = Child("prompt_tuning_jax.batches.build", order, "tokenising demo")
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=rf"^tokenising demo: process {child.pid} was killed by SIGKILL: start"):
        child.finish()
    (tmp_path / "fails.py").write_text("import json, sys\njson.loads(sys.argv[1])['split']\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)^tokenising demo failed:.*Traceback.*KeyError: 'split'"):
        Child("fails", tiny.demo.to_child_request(), "tokenising demo").finish()


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    held, most, failed = [], [], []

    def work(index):
        try:
            for _ in range(20):
                with lock(tmp_path / "lock"):
                    held.append(index)
                    most.append(len(held))
                    held.remove(index)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and set(most) == {1} and len(most) == 80
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("contents", ["", "[]", '{"pid": 1, "host": "another"}'])
def test_a_lock_that_is_not_touched_is_taken(tmp_path, contents):
    """The lock is from another host, whose processes cannot be checked, or half-written. A touched lock is kept."""
    (tmp_path / "lock").write_text(contents)
    released = threading.Event()

    def live():
        for _ in range(10):
            time.sleep(0.1)
            os.utime(tmp_path / "lock")
        released.set()

    thread = threading.Thread(target=live)
    thread.start()
    waited = []
    with lock(tmp_path / "lock", waited.append, dead_after=0.5):
        assert released.is_set()
    thread.join()
    assert waited == ["process 1 on another" if "pid" in contents else "another process"]


def test_an_owner_touches_its_lock(tmp_path):
    with lock(tmp_path / "lock", dead_after=0.3):
        first = (tmp_path / "lock").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / "lock").stat().st_mtime_ns > first


def test_a_changed_task_is_tokenised_again(tiny, tmp_path):
    """This holds for the project's own tasks and for tasks in a user's module."""
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
        (
            {"name": "zzz"},
            r"no task 'zzz'; there are \d+, and python -m prompt_tuning_jax.tasks lists them. Set `name`",
        ),
        ({"modules": ("own_tasks",)}, "no module own_tasks: set `module` to one that Python finds"),
        ({"modules": ("prompt_tuning_jax.taks",)}, "no module prompt_tuning_jax.taks: set `module`"),
    ],
)
def test_a_task_that_is_not_there_is_named_with_its_near_misses(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        find_task(dataclasses.replace(tiny.demo, **change))


@pytest.mark.parametrize("name", ["perceptron_train", "perceptron"])
def test_examples_that_are_no_lists_of_ids_are_refused(tiny, tmp_path, name):
    """Both a task and a mixture of such tasks are refused, whether they would be cached or streamed."""
    request = dataclasses.replace(sst2(tiny, tmp_path / "data", 10), name=f"glue_sst2_v200_{name}")
    message = (
        "^the inputs of glue_sst2_v200_perceptron_(train|test) are int32 of rank 2, expected token ids .integers of "
        "rank 1.: set `name` to another task$"
    )
    with pytest.raises(ValueError, match=message):
        build_missing(request, "train", tmp_path / "cache", True)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=message):
        next(stream(request, "train", 0, 0))


def test_a_split_that_is_not_there_is_named_with_those_that_are(tiny, tmp_path):
    message = "demo_reviews has no split 'test', only train, validation, unseen_words: set `train` or `validation`"
    with pytest.raises(ValueError, match=message):
        build_split(tiny.demo, "test", tmp_path / "task" / "test")
    assert not os.listdir(tmp_path)


def test_a_module_of_the_users_own_registers_tasks(tiny, tmp_path, monkeypatch, forget_tasks):
    """The cache is scored with the task's postprocessor and metric, including their options."""
    (tmp_path / "own_reviews.py").write_text(
        "import functools, seqio, tensorflow as tf\n"
        "from prompt_tuning_jax.tasks.register import FEATURES\n"
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
    examples = CachedExamples(tmp_path / "cache" / "train", slice(None))
    assert [fields["row"] for fields in examples.fields] == [7, 8]
    assert examples.postprocess("good", example={"row": 3}) == "GOOD!3"
    assert score(examples, ["good", "good"]) == {"matches": 10}


def imported(source: str, tiny) -> set[str]:
    """Returns the top-level modules that a program has imported when it ends."""
    source += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | tiny.environment, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch", "transformers"}


def test_reading_and_scoring_a_cache_imports_no_tensorflow(tiny, demo):
    source = (
        f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
        "from cached import load_split, score\n"
        "from prompt_tuning_jax.batches.cache import TaskRequest\n"
        f"examples = load_split(TaskRequest('demo_reviews', {str(tiny.vocabulary)!r}, {LENGTHS}), 'validation')\n"
        "assert score(examples, ['positive'] * 500) == {'accuracy': 50.0}"
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

"""Batches without a cache: a process tokenises as training reads. The same batches from any start, and no orphan."""

import dataclasses
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import LENGTHS, assert_equal, joined, seeds, tokens
from tiny import LENGTHS as TINY_LENGTHS

from prompt_tuning_jax.batches import stream
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import STREAM_WINDOW, StreamedBatches
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.review_grammar import sentences
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

COUNT = 40
NAME = "taskless_glue_sst2_v200"


@pytest.fixture(scope="module")
def request_(tiny, tmp_path_factory):
    """A task of COUNT rows, whose inputs differ."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "SST-2").mkdir()
    lines = ["sentence\tlabel", *(f"{row.text}\t{row.label}" for row in sentences("train")[:COUNT])]
    for split in ("train", "dev"):
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return TaskRequest(NAME, str(tiny.vocabulary), TINY_LENGTHS, str(folder))


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def example(seed, number):
    """One of a made-up stream, of inputs of 2 to 61 tokens."""
    rng = np.random.default_rng([seed, number])
    inputs, targets = (tokens(int(rng.integers(2, most)), number) for most in (62, 22))
    return np.array(inputs, np.int32), np.array(targets, np.int32)


class Written(Child):
    """In place of the process: what it would write of the made-up stream."""

    def __init__(self, seed, start):
        self.close = lambda: None
        self._rest = (example(seed, number) for number in itertools.count(start))
        self._buffer = io.BytesIO()
        self.stdout = SimpleNamespace(read=self._read)

    def _read(self, size):
        found = self._buffer.read(size)
        if len(found) < size:
            self._buffer = io.BytesIO()
            stream.write(itertools.islice(self._rest, 50), self._buffer)
            self._buffer.seek(0)
            found += self._buffer.read(size - len(found))
        return found


class MadeUp(StreamedBatches):
    """Batches of the made-up stream, and where it was started."""

    def __init__(self, batch_size, seed, **options):
        super().__init__(TaskRequest("made_up", "", LENGTHS), "train", batch_size, LENGTHS, seed=seed, **options)
        self.started = []

    def _start(self, example):
        self.started.append(example)
        return Written(self._seed, example)


batch_sizes = st.sampled_from([4, 8])


@settings(max_examples=10)
@given(batch_sizes, seeds, st.integers(0, 2))
def test_windows_hold_the_stream_in_its_order(batch_size, seed, windows):
    batches = MadeUp(batch_size, seed)
    for window in range(windows + 1):
        ids = [batches[window * STREAM_WINDOW + number].ids for number in range(STREAM_WINDOW)]
        size = STREAM_WINDOW * batch_size
        np.testing.assert_array_equal(np.sort(np.concatenate(ids)), np.arange(window * size, (window + 1) * size))
    assert batches.examples_before(5) == 5 * batch_size


@settings(max_examples=10)
@given(batch_sizes, seeds, st.integers(0, 60))
def test_a_row_is_its_example(batch_size, seed, number):
    batch = MadeUp(batch_size, seed)[number]
    for row, at in zip(batch.inputs, batch.ids, strict=True):
        whole = example(seed, int(at))[0]
        kept = min(len(whole), LENGTHS["inputs"])
        np.testing.assert_array_equal(row[: kept - 1], whole[: kept - 1])
        assert row[kept - 1] == whole[-1] and not row[kept:].any()


@settings(max_examples=10)
@given(batch_sizes, seeds, st.integers(0, 60), st.integers(0, 10))
def test_reading_may_start_anywhere(batch_size, seed, start, count):
    """And reads the stream once: a process is started for the first window, and none for those that follow."""
    batches = MadeUp(batch_size, seed)
    expected = [batches[number] for number in range(start, start + count)]
    again = MadeUp(batch_size, seed)
    read = list(again.start_at(start, start + count))
    assert again.started == [start // STREAM_WINDOW * STREAM_WINDOW * batch_size][: bool(count)]
    assert len(read) == count
    for found, batch in zip(read, expected, strict=True):
        assert_equal(found, batch)


@settings(max_examples=10)
@given(batch_sizes, seeds, st.integers(0, 60), st.sampled_from([1, 2, 4]))
def test_processes_share_the_batches_of_one(batch_size, seed, number, count):
    whole = MadeUp(batch_size, seed)[number]
    shares = [MadeUp(batch_size, seed, process_index=index, process_count=count)[number] for index in range(count)]
    assert_equal(whole, joined(shares))


def texts(words, examples):
    return [words.decode(inputs) for inputs, _ in examples]


def test_the_stream_is_the_tasks_rows_without_end(tiny, request_):
    """In an order of the seed; the same from any start, after whatever it skips."""
    words = Vocabulary(tiny.vocabulary)
    whole = texts(words, itertools.islice(stream.stream(request_, "train", 5, 0), 10 * COUNT))
    assert set(whole) == {words.written(f"sentence: {row.text}") for row in sentences("train")[:COUNT]}
    assert texts(words, itertools.islice(stream.stream(request_, "train", 5, 370), 30)) == whole[370:]
    assert texts(words, itertools.islice(stream.stream(request_, "train", 6, 0), 10 * COUNT)) != whole


def test_a_pretraining_text_is_streamed(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"the plot of film {i} was dull and long\n" for i in range(30)))
    request = TaskRequest("text_span_corruption", str(tiny.vocabulary), TINY_LENGTHS, str(tmp_path))
    examples = list(itertools.islice(stream.stream(request, "train", 0, 0), 45))
    assert all(len(inputs) <= TINY_LENGTHS["inputs"] and inputs[-1] == 1 for inputs, _ in examples)
    again = list(itertools.islice(stream.stream(request, "train", 0, 31), 14))
    for left, right in zip(examples[31:], again, strict=True):
        assert_equal(left, right)


def test_a_reader_that_waits_is_waited_for():
    """The pipe is all that is read ahead."""
    reading, writing = os.pipe()
    made = []

    stopped = threading.Event()

    def endless():
        while not stopped.is_set():
            made.append(len(made))
            yield np.arange(500, dtype=np.int32), np.arange(10, dtype=np.int32)

    with os.fdopen(reading, "rb") as reader:
        with os.fdopen(writing, "wb") as pipe:
            thread = threading.Thread(target=stream.write, args=(endless(), pipe))
            thread.start()
            seen = -1
            while len(made) != seen:
                seen = len(made)
                time.sleep(0.5)
            stopped.set()
            drain = threading.Thread(target=reader.read)
            drain.start()
            thread.join()
        drain.join()
    assert 10 < seen < 80, "of 2,048 bytes each, into 64 KiB and a buffer"


def config(request, **changed):
    given = {"split": "train", "use_cached": False, "data_dir": request.data_dir} | changed
    return DatasetConfig(NAME, batch_size=8, task_feature_lengths=TINY_LENGTHS, **given)


def test_the_process_gives_the_stream(tiny, request_, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment["PYTHONPATH"])
    words = Vocabulary(tiny.vocabulary)
    batches = config(request_).batches(words, seed=5)
    read = list(batches.start_at(0, STREAM_WINDOW))
    found = {int(at): words.decode(row) for batch in read for at, row in zip(batch.ids, batch.targets, strict=True)}
    assert len(found) == STREAM_WINDOW * 8
    expected = itertools.islice(stream.stream(request_, "train", 5, 0), STREAM_WINDOW * 8)
    assert [found[at] for at in sorted(found)] == [words.decode(targets) for _, targets in expected]

    # It ends the run with one line where it is killed, and is gone with its batches.
    os.kill(batches._child.pid, signal.SIGKILL)
    message = rf"^tokenising {NAME}, train: process {batches._child.pid} was killed by SIGKILL"
    with pytest.raises(ChildProcessError, match=message):
        for number in range(STREAM_WINDOW, 200 * STREAM_WINDOW):
            batches[number]


def test_a_mistake_of_the_users_ends_a_run_with_its_one_line(tiny, request_, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", tiny.environment["PYTHONPATH"])
    words = Vocabulary(tiny.vocabulary)
    with pytest.raises(ValueError, match=rf"^{NAME} has no split 'dev', only train, validation, test: set `train`"):
        list(config(request_, split="dev").batches(words).start_at(0, 3))
    with pytest.raises(
        ValueError, match=r"^split 'train\[:9\]' is a slice, which `use_cached_tasks`=False cannot read"
    ):
        config(request_, split="train[:9]").batches(words)


ORPHAN = """
import os, time
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.loader import StreamedBatches
batches = StreamedBatches(TaskRequest(**{request!r}), "train", 4, {lengths!r})
batches[0]
import sys
print(batches._child.pid, "tensorflow" in sys.modules or "seqio" in sys.modules, flush=True)
time.sleep(600)
"""


def test_no_process_is_left_when_a_run_is_killed(tiny, request_):
    """And the run itself has not imported TensorFlow."""
    program = ORPHAN.format(request=dataclasses.asdict(request_), lengths=TINY_LENGTHS)
    run = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | tiny.environment, stdout=subprocess.PIPE, text=True
    )
    pid, heavy = run.stdout.readline().split()
    assert heavy == "False"
    os.kill(int(pid), 0)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and lives(int(pid)):
        time.sleep(0.05)
    assert not lives(int(pid))


def lives(pid):
    """Whether a process runs; one that ended and is not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

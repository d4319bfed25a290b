"""Batches as a function of seed and step, of arrays written by hand; at the end what they make of real data."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from cached import load_split
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT

from prompt_tuning_jax.batches.cache import CachedExamples, TaskRequest
from prompt_tuning_jax.batches.loader import Batch, Batches, default_buckets
from prompt_tuning_jax.tokenizers.vocabulary import EOS

LENGTHS = {"inputs": 40, "targets": 12}


def make_examples(inputs, targets, rows=slice(None)):
    """A cache folder of these token lists, read back; the folder is gone when this returns, the arrays are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for feature, lists in (("inputs", inputs), ("targets", targets)):
            np.save(folder / f"{feature}.npy", np.concatenate([np.asarray(tokens, np.int32) for tokens in lists]))
            np.save(folder / f"{feature}_ends.npy", np.cumsum([len(tokens) for tokens in lists], dtype=np.int64))
        task = {"name": "by_hand", "examples": len(inputs), "postprocessor": None, "metrics": []}
        (folder / "task.json").write_text(json.dumps(task))
        return CachedExamples(folder, rows)


def tokens(length, mark):
    """`length` ids that end in an end of sequence and tell one example from another."""
    return [*(2 + (mark * 31 + i) % 200 for i in range(length - 1)), EOS]


@st.composite
def splits(draw):
    """Examples of input lengths 1 to 60 and target lengths 1 to 20, some of them longer than `LENGTHS`."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=40))
    inputs = [tokens(length, i) for i, (length, _) in enumerate(lengths)]
    targets = [tokens(length, i + 100) for i, (_, length) in enumerate(lengths)]
    return make_examples(inputs, targets)


batch_sizes, seeds = st.integers(1, 9), st.integers(0, 2**31)


def joined(shares):
    """The batch that processes share."""
    return Batch(*(np.concatenate(arrays) for arrays in zip(*(share[:3] for share in shares), strict=True)))


def assert_equal(one, other):
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left, right, strict=True)


@given(splits(), batch_sizes, seeds, st.integers(0, 3), st.booleans())
def test_an_epoch_visits_every_example_once(examples, batch_size, seed, epoch, shuffle):
    batches = Batches(examples, batch_size, LENGTHS, seed=seed, shuffle=shuffle)
    seen = [batches[epoch * len(batches) + number].ids for number in range(len(batches))]
    ids = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(len(examples)))
    assert all(len(part) == batch_size for part in seen)
    assert sum(bool((part < 0).any()) for part in seen) <= 1, "only what is left at the end of an epoch has empty rows"


@given(splits(), batch_sizes, seeds, st.integers(0, 50))
def test_a_row_is_its_example_cut_before_the_end_of_sequence_and_padded(examples, batch_size, seed, number):
    batch = Batches(examples, batch_size, LENGTHS, seed=seed)[number]
    for at, name in enumerate(LENGTHS):
        for row, place in zip(batch[at], batch.ids, strict=True):
            if place < 0:
                assert not row.any()
                continue
            whole = getattr(examples, name)[place]
            kept = row[: min(len(whole), LENGTHS[name])]
            assert kept[-1] == EOS
            np.testing.assert_array_equal(kept[:-1], whole[: len(kept) - 1])
            assert not row[len(kept) :].any()


@given(splits(), batch_sizes, seeds, st.integers(0, 50), st.sampled_from([None, (5, 40), (40,), (1, 2, 3, 39, 40)]))
def test_a_batch_is_as_wide_as_the_least_bucket_that_holds_it(examples, batch_size, seed, number, buckets):
    batches = Batches(examples, batch_size, LENGTHS, seed=seed, buckets=buckets)
    batch = batches[number]
    for rows, widths in ((batch.inputs, batches.buckets), (batch.targets, batches.target_buckets)):
        longest = (rows != 0).sum(axis=1).max()
        assert rows.shape[1] == min(width for width in widths if width >= longest)


@given(splits(), batch_sizes, seeds)
def test_batches_hold_examples_of_about_the_same_length(examples, batch_size, seed):
    """A short example is put into a wide batch only to top up the one incomplete batch of its bucket."""
    batches = Batches(examples, batch_size, LENGTHS, seed=seed)
    mixed = 0
    for number in range(len(batches)):
        ids = batches[number].ids
        lengths = np.minimum(examples.inputs.lengths[ids[ids >= 0]], LENGTHS["inputs"])
        mixed += len(set(np.searchsorted(batches.buckets, lengths))) > 1
    assert mixed < len(batches.buckets)


@given(splits(), batch_sizes, seeds, st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_number_alone(examples, batch_size, seed, numbers):
    """Whatever else was read before, and in which order: what makes a run resumable by its step."""
    wandering = Batches(examples, batch_size, LENGTHS, seed=seed)
    for number in numbers:
        assert_equal(wandering[number], Batches(examples, batch_size, LENGTHS, seed=seed)[number])


@settings(max_examples=8)
@given(splits(), batch_sizes, seeds, st.integers(0, 30), st.integers(0, 12))
def test_reading_may_start_anywhere(examples, batch_size, seed, start, count):
    batches = Batches(examples, batch_size, LENGTHS, seed=seed)
    read = list(Batches(examples, batch_size, LENGTHS, seed=seed).start_at(start, start + count))
    assert len(read) == count
    for offset, batch in enumerate(read):
        assert_equal(batch, batches[start + offset])


def test_nothing_is_left_to_read_at_the_last_step():
    batches = Batches(make_examples([tokens(5, 0)], [tokens(2, 0)]), 2, LENGTHS)
    assert list(batches.start_at(7, 7)) == list(batches.start_at(9, 7)) == []


@given(splits(), batch_sizes, seeds, st.integers(0, 60))
def test_the_examples_of_the_steps_before_are_counted(examples, batch_size, seed, step):
    batches = Batches(examples, batch_size, LENGTHS, seed=seed)
    assert batches.examples_before(step) == sum(int((batches[number].ids >= 0).sum()) for number in range(step))


shared_sizes = st.sampled_from([4, 8, 12])


@given(splits(), shared_sizes, seeds, st.integers(0, 60), st.sampled_from([1, 2, 4]), st.booleans())
def test_processes_share_the_batches_of_one(examples, batch_size, seed, number, count, shuffle):
    """Joined, the rows of all are those of one, whatever their number, padded to the same width."""
    whole = Batches(examples, batch_size, LENGTHS, seed=seed, shuffle=shuffle)
    shares = [
        Batches(examples, batch_size, LENGTHS, seed=seed, shuffle=shuffle, process_index=index, process_count=count)
        for index in range(count)
    ]
    assert_equal(joined([share[number] for share in shares]), whole[number])
    assert {share.examples_before(number) for share in shares} == {whole.examples_before(number)}


@settings(max_examples=8)
@given(splits(), shared_sizes, seeds, st.integers(0, 20), st.integers(1, 20), st.sampled_from([2, 4]))
def test_stopping_and_resuming_repeats_and_drops_nothing(examples, batch_size, seed, stop, more, count):
    """On several processes, each of which stops after the same batch."""

    def read(index, process_count, start, end):
        options = {"seed": seed, "process_index": index, "process_count": process_count}
        return list(Batches(examples, batch_size, LENGTHS, **options).start_at(start, end))

    whole = read(0, 1, 0, stop + more)
    parts = [read(index, count, 0, stop) + read(index, count, stop, stop + more) for index in range(count)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert_equal(joined(shares), batch)


def test_a_batch_that_processes_cannot_share_is_refused():
    examples = make_examples([tokens(5, 0)], [tokens(2, 0)])
    message = "^`batch_size` is 30, which 4 processes cannot share equally: set it to a multiple of 4$"
    with pytest.raises(ValueError, match=message):
        Batches(examples, 30, LENGTHS, process_index=1, process_count=4)


def test_epochs_and_seeds_shuffle_differently():
    examples = make_examples([tokens(9, i) for i in range(64)], [tokens(3, i) for i in range(64)])

    def order(seed, epoch):
        batches = Batches(examples, 8, LENGTHS, seed=seed)
        return tuple(np.concatenate([batches[epoch * 8 + number].ids for number in range(8)]))

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(64)) not in orders


def test_without_shuffling_equal_lengths_keep_the_order_of_the_split():
    examples = make_examples([tokens(9, i) for i in range(10)], [tokens(3, i) for i in range(10)])
    batches = Batches(examples, 4, LENGTHS, shuffle=False)
    np.testing.assert_array_equal(
        np.stack([batches[number].ids for number in range(3)]), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    )


def test_ids_count_within_a_slice():
    """An id is a place among the examples of the slice, so that answers can be put back in order."""
    inputs, targets = [tokens(3 + i, i) for i in range(10)], [tokens(3, i) for i in range(10)]
    examples = make_examples(inputs, targets, slice(-4, None))
    batch = Batches(examples, 4, LENGTHS, shuffle=False)[0]
    np.testing.assert_array_equal(batch.ids, [0, 1, 2, 3])
    np.testing.assert_array_equal(batch.inputs[0, :9], inputs[6])


@given(st.integers(1, 5_000))
def test_default_buckets_waste_less_than_half(length):
    buckets = default_buckets(length)
    assert buckets[-1] == length
    assert list(buckets) == sorted(set(buckets))
    assert all(longer <= shorter * 1.5 for shorter, longer in zip(buckets, buckets[1:], strict=False))


def test_a_file_that_lost_its_end_is_refused(tmp_path):
    for name in ("inputs", "targets"):
        np.save(tmp_path / f"{name}.npy", np.arange(2_000, dtype=np.int32))
        np.save(tmp_path / f"{name}_ends.npy", np.array([1_000, 2_000]))
    (tmp_path / "task.json").write_text(json.dumps({"examples": 2, "postprocessor": None, "metrics": []}))
    assert len(CachedExamples(tmp_path, slice(None))) == 2
    (tmp_path / "inputs.npy").write_bytes((tmp_path / "inputs.npy").read_bytes()[:1_000])
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read .*: delete the folder"):
        CachedExamples(tmp_path, slice(None))


# Real data: SST-2 and RTE as GLUE gives them, and the vocabulary of T5.

OFFICIAL = {"inputs": 512, "targets": 16}
ROWS = {"glue_sst2_v200": 67_349, "glue_rte_v200": 2_490}
TOKENISE = """
import json, pathlib, sys
from prompt_tuning_jax.batches.build import TaskRequest, build_missing
for order in json.loads(sys.argv[1]):
    build_missing(TaskRequest.from_json(order), "train", pathlib.Path(sys.argv[2]), True)
"""
# Prints the seconds from a program's start to its first batch, by the clock and of the processor; how many examples it
# then reads in a second of the processor, which a machine under load does not make fewer; and what it has imported.
FIRST_BATCH = """
import os, sys, time
started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
started += int(open("/proc/self/stat").read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary
config = DatasetConfig(split="train[:-2000]", batch_size=32, task_feature_lengths={lengths!r}, **{config!r})
batches = config.batches(Vocabulary({vocabulary!r}), shuffle=True).start_at(0, 2_000)
next(batches)
print(time.time() - started, time.process_time())
started = time.process_time()
count = sum(len(batch.ids) for batch in batches)
print(count / (time.process_time() - started), *sys.modules)
"""


@pytest.fixture(scope="module")
def glue(data_dir, tmp_path_factory):
    """Opens a training split of GLUE's own files, from a cache that was empty at first."""
    cache, vocabulary = tmp_path_factory.mktemp("glue"), str(data_dir / "t5" / "spiece.model")
    requests = {task: TaskRequest(task, vocabulary, OFFICIAL, str(data_dir / "glue")) for task in ROWS}
    # All in one process: to start TensorFlow takes longer than to tokenise.
    orders = json.dumps([dataclasses.asdict(request) for request in requests.values()])
    command = [sys.executable, "-c", TOKENISE, orders, str(cache)]
    started = time.monotonic()
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)

    def open_split(task):
        return load_split(requests[task], "train", cache)

    open_split.seconds = time.monotonic() - started
    open_split.config = {"data_dir": str(data_dir / "glue"), "cache_dir": str(cache)}
    open_split.vocabulary = vocabulary
    return open_split


def padded(examples, batches):
    """Positions of an epoch's inputs that hold no token, as they are and with all inputs padded to 512."""
    seen, positions = [], 0
    for number in range(len(batches)):
        batch = batches[number]
        seen.append(batch.ids)
        positions += batch.inputs.size
    ids = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(ids[ids >= 0]), np.arange(len(examples)))
    used = int(np.minimum(examples.inputs.lengths, OFFICIAL["inputs"]).sum())
    return positions - used, len(batches) * batches.batch_size * OFFICIAL["inputs"] - used


@pytest.mark.parametrize("task, rows", ROWS.items())
def test_buckets_cut_the_padding_of_real_data(glue, task, rows):
    """At least four times fewer padded positions than with 512 for all, every example once an epoch."""
    examples = glue(task)
    assert len(examples) == rows
    bucketed, fixed = padded(examples, Batches(examples, 32, OFFICIAL, seed=3))
    assert fixed > 4 * bucketed


def test_sst2_is_tokenised_within_a_minute_and_a_half(glue):
    """And RTE with it."""
    assert 1 < glue.seconds < 90


def test_batches_come_at_once_and_faster_than_any_step(glue):
    glue("glue_sst2_v200")
    program = FIRST_BATCH.format(
        lengths=OFFICIAL,
        config=glue.config | {"mixture_or_task_name": "glue_sst2_v200"},
        vocabulary=glue.vocabulary,
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    wall, processor, speed, *modules = done.stdout.split()
    assert {"numpy", "grain"} <= {*modules}
    assert not {"tensorflow", "seqio", "tensorflow_datasets"} & {*modules}
    assert min(float(wall), float(processor)) < 3, "2 on a machine that does nothing else"
    assert float(speed) > 20_000

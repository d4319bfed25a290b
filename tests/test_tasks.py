"""Tasks: T5's text formats, rows from the benchmarks' own files, the noise of pre-training, and vocabularies."""

import json
import lzma
import shutil

import numpy as np
import pytest
import seqio
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import LENGTHS, make_tiny

from prompt_tuning_jax.batches.build import find_task
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.tasks import imdb, preprocessors, review_grammar, sources
from prompt_tuning_jax.tasks.vocabularies import EOS, PAD, UNK, Vocabulary

SENTINEL = 31_999  # <extra_id_0> of the noise tests; their tokens are far below


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def t5(data_dir):
    """The vocabulary of the public T5 1.1 checkpoints: ours, and SeqIO's."""
    path = str(data_dir / "t5" / "spiece.model")
    return Vocabulary(path), seqio.SentencePieceVocabulary(path, extra_ids=100)


@pytest.fixture(autouse=True)
def tfds_again():
    yield
    sources.set_data_dir(None)


def rows(task, split="train", data_dir=None):
    sources.set_data_dir(data_dir and str(data_dir))
    return list(task.source.get_dataset(split, shuffle=False).as_numpy_iterator())


def columns(name, data_dir):
    """A whole training split as one batch: row by row, TensorFlow is slow."""
    sources.set_data_dir(str(data_dir))
    dataset = seqio.TaskRegistry.get(name).source.get_dataset("train", shuffle=False)
    return next(dataset.batch(100_000).as_numpy_iterator())


def examples(tiny, name, split="train", data_dir=None):
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    sources.set_data_dir(data_dir and str(data_dir))
    return list(task.get_dataset(None, split, shuffle=False, trim_output_features=False).as_numpy_iterator())


def pretokenized(example):
    return tuple(example[f"{name}_pretokenized"].decode() for name in ("inputs", "targets"))


SST2 = "sentence\tlabel\na fine film . \t1\nit 's \"dull \t0\n"


@pytest.mark.parametrize("prefix, name", [("sst2 ", "glue_sst2_v200"), ("", "taskless_glue_sst2_v200")])
def test_sst2_reads_as_t5_wrote_it(tiny, tmp_path, prefix, name):
    """The blank at the end is in GLUE's file and in T5's inputs; a quote is a character like any other."""
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text(SST2)
    found = examples(tiny, name, data_dir=tmp_path)
    assert [pretokenized(example) for example in found] == [
        (f"{prefix}sentence: a fine film . ", "positive"),
        (f"{prefix}sentence: it 's \"dull ", "negative"),
    ]
    assert [example["idx"] for example in found] == [0, 1]
    words = Vocabulary(tiny.vocabulary)
    for example in found:
        for feature, text in zip(("inputs", "targets"), pretokenized(example), strict=True):
            assert list(example[feature]) == [*words.encode(text), EOS]


@pytest.mark.parametrize("label, index", [("negative", 0), ("positive", 1), ("positively", -1), ("", -1)])
def test_an_answer_is_a_label_or_minus_one(tiny, label, index):
    for name in ("glue_sst2_v200", "imdb_reviews_v100", "demo_reviews"):
        assert find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS)).postprocess_fn(label) == index


def test_sst2_of_glue_is_whole(data_dir):
    found = columns("glue_sst2_v200", data_dir / "glue")
    assert len(found["label"]) == 67_349
    assert list(np.bincount(found["label"])) == [29_780, 37_569]
    # The first row as TFDS has it.
    assert (found["sentence"][0], found["label"][0], found["idx"][0]) == (
        b"hide new secretions from the parental units ", 0, 0,
    )  # fmt: skip


def test_imdb_is_whole_and_any_slice_holds_both_labels(data_dir):
    labels = columns("imdb_reviews_v100", data_dir / "imdb")["label"]
    assert list(np.bincount(labels)) == [12_500, 12_500]
    for part in (labels[:2_500], labels[-2_500:]):
        assert 0.45 < part.mean() < 0.55


def test_imdb_targets_are_the_labels_names(tiny, tmp_path):
    lines = [json.dumps({"text": f"review {i}", "label": i % 2}) for i in range(6)]
    with lzma.open(tmp_path / "imdb_train.jsonl.xz", "wt") as file:
        file.write("\n".join(lines))
    found = [pretokenized(example) for example in examples(tiny, "imdb_reviews_v100", data_dir=tmp_path)]
    assert sorted(found) == [(f"review {i}", imdb.LABELS[i % 2]) for i in range(6)]
    assert found != sorted(found), "the file has its labels in blocks; a slice of the task should not"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_file_may_be_compressed(tmp_path, suffix):
    import gzip

    opener = {"": open, ".gz": gzip.open, ".xz": lzma.open}[suffix]
    with opener(tmp_path / f"imdb_train.jsonl{suffix}", "wt") as file:
        file.write('{"text": "fine", "label": 1, "idx": 7}\n')
    assert rows(seqio.TaskRegistry.get("imdb_reviews_v100"), data_dir=tmp_path) == [
        {"text": b"fine", "label": 1, "idx": 7}
    ]


def test_rows_are_sharded_and_repeated_as_seqio_asks(tmp_path):
    (tmp_path / "imdb_train.jsonl").write_text("".join(f'{{"text": "{i}", "label": 0}}\n' for i in range(10)))
    sources.set_data_dir(str(tmp_path))
    source = seqio.TaskRegistry.get("imdb_reviews_v100").source

    def texts(**options):
        return [row["text"] for row in source.get_dataset("train", **options).as_numpy_iterator()]

    whole = texts(shuffle=False)
    shards = [texts(shuffle=False, shard_info=seqio.ShardInfo(index, 3)) for index in range(3)]
    assert sorted(sum(shards, [])) == sorted(whole)
    assert texts(shuffle=False, num_epochs=2) == whole * 2
    shuffled = texts(shuffle=True, seed=1)
    assert shuffled != whole and sorted(shuffled) == sorted(whole)


@pytest.mark.parametrize("split", review_grammar.SPLIT_SIZES)
def test_the_demos_task_is_the_grammars_sentences(tiny, split):
    expected = [(f"sentence: {row.text}", review_grammar.LABELS[row.label]) for row in review_grammar.sentences(split)]
    assert [pretokenized(example) for example in examples(tiny, "demo_reviews", split)] == expected


@pytest.mark.parametrize("name", ["text_span_corruption", "text_prefix_lm"])
def test_a_text_task_holds_every_document_once(tiny, tmp_path, name):
    """Long documents are cut into pieces that fit and short ones kept: no token of the text is lost."""
    documents = [" ".join(["the plot was dull ."] * n) for n in (1, 2, 5, 30, 3)]
    (tmp_path / "a.txt").write_text("\n".join([*documents[:2], "", "  ", *documents[2:4]]) + "\n")
    with lzma.open(tmp_path / "b.txt.xz", "wt") as file:
        file.write(documents[4])
    task = find_task(TaskRequest(name, str(tiny.vocabulary), LENGTHS))
    lengths = {"inputs": 24, "targets": 12}
    sources.set_data_dir(str(tmp_path))
    found = list(task.get_dataset(lengths, "train", shuffle=False, trim_output_features=False).as_numpy_iterator())
    words = Vocabulary(tiny.vocabulary)
    text = []
    for example in found:
        inputs, targets = example["inputs"], example["targets"]
        assert inputs[-1] == targets[-1] == EOS
        assert len(inputs) <= 24 and len(targets) <= 12
        inputs, targets = list(inputs[:-1]), list(targets[:-1])
        text += splice(inputs, targets, words.size - 1) if name == "text_span_corruption" else inputs + targets
    assert text == [token for document in documents for token in words.encode(document)]


def test_a_part_of_the_text_is_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1_000)))
    task = seqio.TaskRegistry.get("text_prefix_lm")
    train, validation = ([row["text"] for row in rows(task, split, tmp_path)] for split in ("train", "validation"))
    assert len(validation) == 5
    assert sorted(train + validation) == sorted(f"line {i}".encode() for i in range(1_000))


def splice(inputs, targets, first):
    """The source of a corrupted example: each sentinel of the inputs is replaced by what follows it in the targets."""
    spans = {}
    for token in targets:
        if token > first - 100:
            spans[token] = current = []
        else:
            current.append(token)
    return [part for token in inputs for part in (spans.pop(token) if token > first - 100 else [token])]


sources_of_noise = st.tuples(st.integers(2, 700), st.integers(0, 2**32 - 1))
densities = st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.05, 2.0), (0.8, 1.0)])


@given(sources_of_noise, densities)
def test_corrupted_spans_put_back_give_the_source(source, noise):
    length, seed = source
    density, mean_span = noise
    tokens = np.random.default_rng(seed).integers(3, 1_000, length, np.int32)
    inputs, targets = preprocessors.corrupt_spans(tokens, np.random.default_rng(seed), SENTINEL, density, mean_span)
    assert inputs.dtype == targets.dtype == np.int32
    assert splice(inputs, targets, SENTINEL) == list(tokens)

    lost = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(lost / mean_span), 1), length - lost, 100)
    assert len(targets) == lost + spans
    assert len(inputs) == length - lost + spans
    for part in (inputs, targets):
        places = np.flatnonzero(part > SENTINEL - 100)
        np.testing.assert_array_equal(part[places], SENTINEL - np.arange(spans))
        assert (np.diff(places) > 1).all(), "between two sentinels is a token"
    assert inputs[0] < 1_000 and inputs[-1] == SENTINEL - spans + 1
    assert targets[0] == SENTINEL and targets[-1] < 1_000


def test_spans_have_all_lengths_and_every_place():
    """Of twelve tokens, four lost in two spans: every way of it comes up, about as often as every other."""
    tokens = np.arange(3, 15, dtype=np.int32)
    rng = np.random.default_rng(0)
    seen = {}
    for _ in range(4_200):
        inputs, _ = preprocessors.corrupt_spans(tokens, rng, SENTINEL, density=4 / 12, mean_span=2.0)
        seen[tuple(inputs)] = seen.get(tuple(inputs), 0) + 1
    assert len(seen) == 7 * 3  # ways to split eight kept tokens in two, times ways to split four lost ones
    assert min(seen.values()) > 120 and max(seen.values()) < 280  # 200 expected of each; six standard deviations


def corrupted_length(length, density, mean_span):
    tokens = np.full(length, 3, np.int32)
    inputs, targets = preprocessors.corrupt_spans(tokens, np.random.default_rng(0), SENTINEL, density, mean_span)
    return len(inputs) + 1, len(targets) + 1  # an end of sequence each


@given(st.integers(3, 3_000), st.sampled_from([(0.15, 3.0), (0.5, 3.0), (0.15, 8.0)]))
def test_the_source_is_as_long_as_fits_the_inputs(inputs_length, noise):
    length = preprocessors.span_corruption_length(inputs_length, *noise)
    assert corrupted_length(length, *noise)[0] == inputs_length
    assert corrupted_length(length + 1, *noise)[0] == inputs_length + 1


def test_t5s_own_lengths():
    """T5 pre-trains on inputs of 512 and targets of 114 (its gin files), from 568 tokens."""
    assert preprocessors.span_corruption_length(512, 0.15, 3.0) == 568
    assert corrupted_length(568, 0.15, 3.0) == (512, 114)


@given(st.integers(1, 80), st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_a_prefix_and_its_continuation_are_the_source(max_inputs, max_targets, seed, data):
    assume(max_inputs + max_targets >= 2)
    length = data.draw(st.integers(2, max_inputs + max_targets))
    tokens = np.arange(length, dtype=np.int32)
    inputs, targets = preprocessors.split_prefix(tokens, np.random.default_rng(seed), max_inputs, max_targets)
    np.testing.assert_array_equal(np.concatenate([inputs, targets]), tokens)
    assert 1 <= len(inputs) <= max_inputs and 1 <= len(targets) <= max_targets


def test_a_prefix_may_end_anywhere():
    rng = np.random.default_rng(0)
    cuts = [len(preprocessors.split_prefix(np.arange(20, dtype=np.int32), rng, 16, 12)[0]) for _ in range(900)]
    assert set(cuts) == set(range(8, 17))
    assert max(map(cuts.count, set(cuts))) < 160  # 100 expected of each


def test_a_pretraining_example_has_noise_of_its_own_and_the_same_each_time(tiny, tmp_path):
    (tmp_path / "a.txt").write_text(("the plot was dull and the score was lovely in the end . " * 2 + "\n") * 20)
    once, again = ([*map(str, examples_of_text(tiny, tmp_path))] for _ in range(2))
    assert once == again
    assert len(set(once)) > 10


def examples_of_text(tiny, folder):
    task = find_task(TaskRequest("text_span_corruption", str(tiny.vocabulary), LENGTHS))
    sources.set_data_dir(str(folder))
    dataset = task.get_dataset({"inputs": 64, "targets": 16}, "train", shuffle=False, seed=0)
    return [example["inputs"] for example in dataset.as_numpy_iterator()]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=60)


@given(texts)
def test_encoding_is_seqios(t5, text):
    ours, theirs = t5
    assert ours.encode(text) == theirs.encode(text) == list(theirs.encode_tf(text).numpy())
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@given(st.lists(st.integers(3, 31_999), max_size=20), st.lists(st.integers(3, 31_999), max_size=5))
def test_decoding_is_seqios_up_to_the_end_of_sequence(t5, before, after):
    ours, theirs = t5
    assert ours.decode(np.array([*before, EOS, *after, PAD])) == theirs.decode([*before, EOS, *after])
    assert ours.decode([*before, PAD, PAD]) == theirs.decode(before)


def test_sentinels_are_the_last_ids(t5):
    ours, theirs = t5
    assert ours.size == theirs.vocab_size == 32_100
    for token, text in ((32_099, "<extra_id_0>"), (32_000, "<extra_id_99>")):
        assert ours.decode([token]) == ours.piece(token) == theirs.decode([token]) == text
    for token in (32_100, 32_127):  # rows that pad a model's table
        assert ours.decode([token, *ours.encode("a film")]) == ours.decode([UNK, *ours.encode("a film")])
        assert ours.piece(token) == "<unk>"
    assert ours.decode([*ours.encode("a film"), 32_099, *ours.encode("good"), EOS]) == "a film <extra_id_0> good"


def test_pieces_are_written_as_the_model_has_them(t5):
    ours, _ = t5
    assert [ours.piece(token) for token in (PAD, EOS, UNK, *ours.encode("a film"))] == [
        "<pad>", "</s>", "<unk>", "▁", "a", "▁film",
    ]  # fmt: skip


def test_written_is_what_comes_back(t5, tiny):
    ours, _ = t5
    assert ours.written("True  Story") == "True Story"
    assert Vocabulary(tiny.vocabulary).written("Positive") == "positive"


def test_a_vocabularys_fingerprint_is_its_contents(tiny, tmp_path):
    path = tmp_path / "copy.model"
    shutil.copy(tiny.vocabulary, path)
    assert Vocabulary(path).fingerprint == Vocabulary(tiny.vocabulary).fingerprint
    path.write_bytes(tiny.vocabulary.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match=f"{path} is not a SentencePiece model: set VOCABULARY"):
        Vocabulary(path)


def test_tensorflow_is_told_nothing_of_the_gpu():
    """The tests' own safety: TensorFlow beside JAX in one process takes no memory of an accelerator."""
    assert not tf.config.get_visible_devices("GPU")

"""Rows tokenised in this process: the same tokens as SeqIO's, batches as from a cache, and a fingerprint of them."""

import functools
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import seqio
import tensorflow as tf
from cached import load_split
from hypothesis import given
from hypothesis import strategies as st
from tiny import LENGTHS, ROOT

from prompt_tuning_jax.batches import cache as cache_module
from prompt_tuning_jax.batches import examples as examples_module
from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.dataset import DatasetConfig, fingerprint_of
from prompt_tuning_jax.batches.examples import tokenize_rows
from prompt_tuning_jax.batches.loader import MixedBatches, StreamedBatches
from prompt_tuning_jax.checkpoints.base import EMBEDDED
from prompt_tuning_jax.tasks import metrics, postprocessors
from prompt_tuning_jax.tasks.reviews import NAME, Reviews
from prompt_tuning_jax.tasks.rows import Rows
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import BESIDE, BYTES, EOS, Vocabulary

NANO = str(EMBEDDED["nano"] / BESIDE)
HARD = [
    "a plain text", "  blanks  in   front, between and behind  ", "tab\tand\nline\r\nbreaks", "\u00a0no-break\u2003em ",
    "Caf\u00e9 cafe\u0301 \ufb01ne", "\U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467", "日本",
    "\u200bzero\u200bwidth\ufeff", "nul \x00 and bell \x07", "</s> <pad> <unk>", "▁ the mark itself ▁", "1", "-0.5",
    "مرحبا", "UPPER Straße İstanbul", "a long text " * 3_000, "\ud7ff\ue000 private \U0010ffff", "\\N \"quoted\" 'x'",
]  # fmt: skip
# Of ByT5, which has no ids for them, only SeqIO's own preprocessors make sentinels, not its tokenizer.
SENTINELS = ["<extra_id_0> a <extra_id_1> b<extra_id_2>", "<extra_id_99><extra_id_100>"]


def seqio_task(rows, vocabulary):
    """The SeqIO task of rows that have text alone."""
    columns = {name: [row[name] for row in rows] for name in ("inputs", "targets")}

    def source(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices(columns)

    return seqio.Task(
        "rows",
        source=seqio.FunctionDataSource(source, splits=("train",)),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features={name: seqio.Feature(seqio_vocabulary(vocabulary), add_eos=True) for name in columns},
    )


def assert_is_seqios(rows, vocabulary):
    found = tokenize_rows(rows, Vocabulary(vocabulary))
    dataset = seqio_task(rows, vocabulary).get_dataset(None, "train", shuffle=False, trim_output_features=False)
    expected = [*dataset.as_numpy_iterator()]
    assert len(found) == len(expected) == len(rows)
    for at, example in enumerate(expected):
        np.testing.assert_array_equal(found.inputs[at], example["inputs"], strict=True)
        np.testing.assert_array_equal(found.targets[at], example["targets"], strict=True)
        kept = {name: example[name].decode() for name in ("inputs_pretokenized", "targets_pretokenized")}
        assert found.fields[at] == kept


@pytest.mark.parametrize("name", ["nano", "t5", "tiny", BYTES])
def test_hard_texts_have_seqios_tokens(request, tiny, name):
    vocabulary = {"nano": NANO, "tiny": str(tiny.vocabulary), BYTES: BYTES}.get(name)
    vocabulary = vocabulary or str(request.getfixturevalue("data_dir") / "t5" / "spiece.model")
    texts = HARD + (SENTINELS if name != BYTES else [])
    assert_is_seqios([{"inputs": one, "targets": two} for one, two in zip(texts, texts[::-1], strict=True)], vocabulary)


@pytest.mark.parametrize("folder, inputs, targets", [("WiC", "sentence1", "word"), ("RTE", "premise", "label")])
def test_real_rows_have_seqios_tokens(data_dir, folder, inputs, targets):
    with open(data_dir / "super_glue" / folder / "train.jsonl") as lines:
        rows = [{"inputs": row[inputs], "targets": row[targets]} for row in map(json.loads, lines)]
    assert len(rows) > 2_000
    assert_is_seqios(rows, str(data_dir / "t5" / "spiece.model"))


def test_only_ties_are_broken_otherwise(data_dir):
    """Of "AAA" both "A", "AA" and "AA", "A" are best: SentencePiece and TensorFlow Text differ in which they take."""
    with open(data_dir / "super_glue" / "BoolQ" / "train.jsonl") as lines:
        texts = [json.loads(line)["passage"] for line in lines][:3_000]
    vocabulary = str(data_dir / "t5" / "spiece.model")
    found = Vocabulary(vocabulary).encode_all(texts)
    expected = seqio_vocabulary(vocabulary).tf_tokenizer.tokenize(texts).to_list()
    other = [at for at, ids in enumerate(found) if ids != expected[at]]
    assert len(other) <= 0.005 * len(texts)
    assert all(sorted(found[at]) == sorted(expected[at]) for at in other), "the same pieces, whose scores add up alike"


@pytest.fixture(scope="module")
def reviews_cache(tmp_path_factory):
    """A cache of the SeqIO task's splits with the vocabulary of the embedded base model."""
    folder = tmp_path_factory.mktemp("reviews")
    for split in ("train", "validation", "unseen_words"):
        build_missing(TaskRequest(NAME, NANO, {"inputs": 48, "targets": 8}), split, folder, False)
    return folder


@pytest.mark.parametrize("split", ["train", "validation", "unseen_words", "train[3:-1900]"])
def test_the_demos_rows_are_the_seqio_tasks(reviews_cache, split):
    """Tokens, order, fields, labels, metrics and batches; only where scoring may read other fields is unknown."""
    config = functools.partial(DatasetConfig, NAME, split, 32, {"inputs": 48, "targets": 8})
    words = Vocabulary(NANO)
    ours, theirs = config(source=Reviews()), config(cache_dir=str(reviews_cache))
    (found,), (expected,) = (one.eval_batches(words).values() for one in (ours, theirs))
    assert found.examples.fields == expected.examples.fields
    assert found.examples.token_fingerprint() == expected.examples.token_fingerprint()
    assert [metric.func for metric in found.examples.metrics] == [metric.func for metric in expected.examples.metrics]
    for one in (found, expected):
        assert postprocessors.answers(one.examples.postprocess) == ("negative", "positive")
    ours, theirs = (one.batches(words, seed=3, shuffle=True) for one in (ours, theirs))
    for number in range(2 * len(ours)):
        for left, right in zip(ours[number], theirs[number], strict=True):
            np.testing.assert_array_equal(left, right, strict=True)


def test_rows_files_and_a_cache_of_the_same_texts_have_the_same_tokens(tiny, tmp_path, monkeypatch, forget_tasks):
    """And rows and files the same fingerprint, wherever the files lie and whatever they are called."""
    words = Vocabulary(tiny.vocabulary)
    texts = [*Reviews().rows("validation")[:50], *Reviews().rows("unseen_words")[:30]]
    rows = [{name: row[name] for name in ("inputs", "targets")} for row in texts]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["targets\tinputs", *("\t".join((row["targets"], row["inputs"])) for row in rows)]
    (tmp_path / "other.tsv").write_text("\n".join(lines) + "\n")
    sources = [
        Rows(rows, metrics=["accuracy"]),
        TaskFiles({"train": str(tmp_path / "data.jsonl")}),
        TaskFiles({"train": "other.tsv"}, data_dir=str(tmp_path)),
        Rows([row | {"id": at} for at, row in enumerate(rows)]),
    ]
    found = [DatasetConfig(f"name {at}", "train", 4, LENGTHS, source=source) for at, source in enumerate(sources)]
    prints = [one.batches(words).fingerprint() for one in found]
    assert len({*prints}) == 1 and len({fingerprint_of(one.eval_batches(words)) for one in found}) == 1
    assert len(prints[0]) == 16 and int(prints[0], 16)

    (tmp_path / "own.py").write_text(OWN.format(path=str(tmp_path / "data.jsonl")))
    monkeypatch.syspath_prepend(tmp_path)
    request = TaskRequest("own_rows", str(tiny.vocabulary), LENGTHS, None, ("own",))
    build_missing(request, "train", tmp_path / "cache", True)
    cached = load_split(request, "train", tmp_path / "cache")
    expected = found[0].batches(words).examples
    assert cached.token_fingerprint() == expected.token_fingerprint()
    assert cached[3:-1].token_fingerprint() == expected[3:-1].token_fingerprint() != expected.token_fingerprint()
    assert cached[3:-1].fingerprint() != cached.fingerprint()


OWN = """
import json, seqio, tensorflow as tf
from prompt_tuning_jax.tasks.register import FEATURES
def rows(split, shuffle_files, seed=None):
    with open({path!r}) as lines:
        found = [*map(json.loads, lines)]
    return tf.data.Dataset.from_tensor_slices({{name: [row[name] for row in found] for name in ("inputs", "targets")}})
seqio.TaskRegistry.add("own_rows", source=seqio.FunctionDataSource(rows, splits=("train",)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features=FEATURES, metric_fns=[])
"""

words_of = st.sampled_from("a dull bright film plot was is the <extra_id_0> Dull FILM".split())
a_text = st.lists(words_of, min_size=1, max_size=5).map(" ".join)
a_row = st.fixed_dictionaries({"inputs": a_text, "targets": a_text})
some_rows = st.lists(a_row, min_size=1, max_size=8)


@given(some_rows, some_rows)
def test_other_rows_have_another_fingerprint(one, other):
    """Also where only the order, a row's end or the case of a letter differs, which this vocabulary does not see."""
    words = case_folding()
    prints = [tokenize_rows(rows, words).fingerprint() for rows in (one, other)]
    assert (prints[0] == prints[1]) == (one == other)


@given(some_rows, st.data())
def test_a_changed_row_is_seen(rows, data):
    words = case_folding()
    at = data.draw(st.integers(0, len(rows) - 1))
    name = data.draw(st.sampled_from(["inputs", "targets"]))
    before = tokenize_rows(rows, words).fingerprint()
    for changed in (rows[at][name] + " x", rows[at][name].swapcase(), f" {rows[at][name]}"):
        other = [*rows[:at], rows[at] | {name: changed}, *rows[at + 1 :]]
        assert tokenize_rows(other, words).fingerprint() != before
    assert tokenize_rows([*rows, rows[at]], words).fingerprint() != before
    assert tokenize_rows([dict(row) for row in rows], words).fingerprint() == before


@functools.cache
def case_folding():
    return Vocabulary(NANO)


def test_tokens_count_where_the_texts_are_the_same(tiny):
    """Another vocabulary, the end of inputs at another place, and the rows' division."""
    rows = [{"inputs": "the plot was dull", "targets": "bad"}]
    one, other = (tokenize_rows(rows, Vocabulary(path)) for path in (NANO, tiny.vocabulary))
    assert one.fingerprint() != other.fingerprint() and one.token_fingerprint() != other.token_fingerprint()
    bytes_ = Vocabulary(BYTES)
    parts = [[("ab", "c")], [("a", "bc")], [("a", "b"), ("c", "d")], [("a", "b"), ("d", "c")], [("c", "d"), ("a", "b")]]
    made = [tokenize_rows([{"inputs": i, "targets": t} for i, t in part], bytes_) for part in parts]
    assert len({examples.token_fingerprint() for examples in made}) == len(parts)


def test_what_scores_the_rows_is_part_of_the_fingerprint():
    words, rows = case_folding(), [{"inputs": "a film", "targets": "good"}]
    label = functools.partial(postprocessors.label_index, labels=("bad", "good"))
    other = functools.partial(postprocessors.label_index, labels=("good", "bad"))
    scored = [(None, []), (None, [metrics.accuracy]), (label, [metrics.accuracy]), (other, [metrics.accuracy])]
    scored += [(label, [metrics.accuracy, metrics.f1]), (label, [metrics.f1, metrics.accuracy])]
    scored += [(label, [functools.partial(metrics.mean_f1, classes=n)]) for n in (2, 3)]
    prints = [tokenize_rows(rows, words, *each).fingerprint() for each in scored]
    assert len({*prints}) == len(scored)
    assert len({tokenize_rows(rows, words, *each).token_fingerprint() for each in scored}) == 1
    listed = functools.partial(postprocessors.label_index, labels=["bad", "good"])
    assert tokenize_rows(rows, words, listed, [metrics.accuracy]).fingerprint() == prints[2], "as a cache has it"


def test_batches_of_any_kind_have_a_fingerprint(tiny, tmp_path):
    words = case_folding()
    one, other = (tokenize_rows([{"inputs": text, "targets": "x"}] * 9, words) for text in ("a film", "a plot"))
    part = cache_module.Part

    def mixed(**parts):
        return MixedBatches(parts, 4, LENGTHS).fingerprint()

    first = mixed(a=part(1.0, one), b=part(2.0, other))
    assert first == mixed(c=part(1.0, one), d=part(2.0, other)), "names do not matter"
    assert len({first, mixed(a=part(2.0, one), b=part(1.0, other)), mixed(a=part(1.0, other), b=part(2.0, one))}) == 3

    def streamed(split="train", **changed):
        fields = {"name": "glue_sst2_v200", "vocabulary": NANO, "feature_lengths": LENGTHS} | changed
        return StreamedBatches(TaskRequest(**fields), split, 4, LENGTHS).fingerprint()

    others = [streamed("validation"), streamed(vocabulary=str(tiny.vocabulary)), streamed(name="glue_cola_v002")]
    assert streamed() == streamed() and len({streamed(), *others}) == 4


def test_a_row_ends_and_is_counted_before_it_is_truncated():
    words = case_folding()
    texts = ["the plot was dull", "a", "a film about a sheriff and his older sister"]
    examples = tokenize_rows([{"inputs": text, "targets": text} for text in texts], words)
    for at, text in enumerate(texts):
        assert examples.inputs[at].tolist() == examples.targets[at].tolist() == [*words.encode(text), EOS]
    lengths = [len(words.encode(text)) + 1 for text in texts]
    assert examples.inputs.lengths.tolist() == lengths and examples.inputs[0].dtype == np.int32
    assert examples.count_truncated({"inputs": lengths[0], "targets": 1}) == {"inputs": 1, "targets": 3}
    assert [row["inputs_pretokenized"] for row in examples[1:].fields] == texts[1:]
    assert examples[1:].rows.tolist() == [1, 2] and len(examples[:-1]) == 2


def test_what_a_row_has_beside_its_texts_is_kept():
    rows = [{"inputs": "a", "targets": "b", "id": 7, "tags": ["x"]}, {"inputs": "a", "targets": "b"}]
    examples = tokenize_rows(rows, case_folding())
    texts = {"inputs_pretokenized": "a", "targets_pretokenized": "b"}
    assert examples.fields == [texts | {"id": 7, "tags": ["x"]}, texts]


def test_runs_on_the_same_rows_share_their_tokens(tmp_path):
    """As long as one of them is there; a changed file is another."""
    path = tmp_path / "rows.tsv"
    path.write_text("inputs\ttargets\na film\tgood\n")
    config = DatasetConfig("mine", "train", 1, LENGTHS, source=TaskFiles({"train": str(path)}))
    first = config.batches(case_folding()).examples
    assert config.eval_batches(case_folding())["mine"].examples is first
    path.write_text("inputs\ttargets\na film\tbad\n")
    assert config.batches(case_folding()).examples.fields[0]["targets_pretokenized"] == "bad"


def test_nothing_is_started_and_nothing_kept(tmp_path, monkeypatch, capfd):
    def never(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(cache_module, "Child", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    lengths = {"inputs": 16, "targets": 8}
    config = DatasetConfig(NAME, "train[:100]", 10, lengths, cache_dir=str(tmp_path / "cache"), source=Reviews())
    words, said = case_folding(), []
    expected = sum(len(words.encode(row["inputs"])) + 1 > 16 for row in Reviews().rows("train")[:100])
    line = f"{NAME} train[:100]: `lengths` {lengths} truncate inputs of {expected} of 100 examples"
    config.batches(words, say=said.append)
    assert said == [line]
    config.batches(words, say=None)
    config.eval_batches(words, say=None)
    assert capfd.readouterr() == ("", "")
    config.batches(words)
    config.eval_batches(words)
    assert capfd.readouterr() == ("", f"{line}\n" * 2)
    dataset = DatasetConfig(NAME, "train", 10, LENGTHS, use_cached=False, source=Reviews())
    assert len(dataset.batches(words, say=None).examples) == 2_000, "there is no cache to do without"
    assert not (tmp_path / "cache").exists()


def test_tokenising_needs_no_tensorflow():
    program = (
        "from prompt_tuning_jax.batches.dataset import DatasetConfig\n"
        "from prompt_tuning_jax.tasks.reviews import Reviews\n"
        "from prompt_tuning_jax.tasks.user_files import TaskFiles\n"
        "from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary\n"
        f"config = DatasetConfig('mine', 'train', 4, {LENGTHS}, source=Reviews())\n"
        f"config.batches(Vocabulary({NANO!r}))[0], config.eval_batches(Vocabulary({NANO!r}))['mine'][0]\n"
        "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert not {*done.stdout.split()} & {"tensorflow", "seqio", "tensorflow_text", "torch", "jax"}


@pytest.fixture(scope="module")
def many():
    """100,000 rows of about 30 words."""
    draw = random.Random(0)
    vocabulary = " ".join(row["inputs"] for row in Reviews().rows("train")).split()
    return [{"inputs": " ".join(draw.choices(vocabulary, k=30)), "targets": "positive"} for _ in range(100_000)]


def test_a_hundred_thousand_rows_are_tokenised_in_seconds(many, capfd):
    """In one call for thousands of texts; the bar is for those that wait, and quiet means quiet."""
    started = time.process_time()
    examples = tokenize_rows(many, case_folding(), quiet=True)
    assert len(many) / (time.process_time() - started) > 5_000, "20,000 on a machine that does nothing else"
    assert len(examples) == len(many) and capfd.readouterr() == ("", "")


def test_a_bar_is_shown_where_it_takes_long(many, monkeypatch, capfd):
    tokenize_rows(many[:1_000], case_folding(), quiet=False)
    assert capfd.readouterr() == ("", ""), "it did not take long"
    monkeypatch.setattr(examples_module, "PATIENCE", 0.0)
    tokenize_rows(many[:10_000], case_folding(), quiet=False)
    assert "tokenising" in capfd.readouterr().err

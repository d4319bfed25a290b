"""SentencePiece vocabularies with their 100 sentinels, whether the file has them or not, ByT5's bytes, and the models
that they fit."""

import dataclasses
import json

import numpy as np
import pytest
import seqio
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tiny import CONFIG
from transformers import AutoTokenizer, ByT5Tokenizer

from experiments.sizes import SIZES
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import EMBEDDED, default_vocabulary, expected_shapes, open_vocabulary
from prompt_tuning_jax.methods.model_tuning import ModelTuning
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import BYTES, EOS, Vocabulary
from prompt_tuning_jax.training.loop import train
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.run import TrainConfig

TEXT = "Prompt tuning adds 100 vectors, and no more."

# Texts with sentinels at the start of a word, within one, side by side, with any spaces about them, and of any number.
SENTINELS = st.integers(0, 120).map("<extra_id_{}>".format)
TEXTS = st.lists(
    SENTINELS | st.sampled_from([" ", "  ", "a", "film", "Film,", "<", "extra_id_3>", "é", "\n"]) | st.text(max_size=3),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def real(data_dir):
    """T5's own file: 32,000 pieces."""
    return data_dir / "t5" / "spiece.model"


@pytest.fixture(scope="module")
def with_sentinels(real, tmp_path_factory):
    """The same with the sentinels as its last pieces, as `cc_all.32000.100extra` and mT5's file have them."""
    model = sentencepiece_model_pb2.ModelProto.FromString(real.read_bytes())
    for i in reversed(range(100)):
        model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=4)
    path = tmp_path_factory.mktemp("vocabulary") / "sentencepiece.model"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_real_vocabulary_has_32100_ids(real):
    words = Vocabulary(real)
    assert (words.size, words.extra_ids) == (32_100, 100)
    assert words.piece(32_099) == "<extra_id_0>"
    assert words.piece(32_000) == "<extra_id_99>"
    assert words.decode([32_099, *words.encode("fine"), 32_098]) == "<extra_id_0> fine <extra_id_1>"
    assert words.encode(TEXT) == seqio.SentencePieceVocabulary(str(real), extra_ids=100).encode(TEXT)


def test_sentinels_in_the_file_are_not_added_again(real, with_sentinels):
    """Both files of T5's vocabulary give every id the same meaning."""
    words, plain = Vocabulary(with_sentinels), Vocabulary(real)
    assert (words.size, words.extra_ids) == (32_100, 0)
    assert words.encode(TEXT) == plain.encode(TEXT)
    ids = [32_099, *plain.encode("fine"), 32_000, 5, 31_999]
    assert words.decode(ids) == plain.decode(ids)
    assert [words.piece(i) for i in (0, 5, 31_999, 32_000, 32_099)] == [
        plain.piece(i) for i in (0, 5, 31_999, 32_000, 32_099)
    ]


@pytest.fixture(scope="module")
def pairs(real, with_sentinels):
    """Vocabularies beside SeqIO's of the same file: T5's in both forms, and a case-folding one."""
    files = (real, with_sentinels, EMBEDDED["nano"] / "spiece.model")
    more = (100, 0, 100)
    return [
        (Vocabulary(path), seqio.SentencePieceVocabulary(str(path), extra_ids=count))
        for path, count in zip(files, more, strict=True)
    ]


@given(TEXTS)
@example("<extra_id_0> positive <extra_id_99>, jel<extra_id_1>ly<extra_id_2><extra_id_3>")
def test_texts_with_sentinels_are_what_seqio_makes_of_them(pairs, text):
    for ours, theirs in pairs:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == ours.written(text) == theirs.decode(ids)


@given(st.lists(st.integers(0, 40) | st.integers(0, 32_127) | st.integers(31_990, 32_127), max_size=8))
def test_ids_are_what_seqio_makes_of_them(pairs, ids):
    """Padding, ends of sequence, sentinels, and rows of the table that no id has."""
    for ours, theirs in pairs:
        assert ours.decode(np.asarray(ids, np.int32)) == theirs.decode(ids)


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_it_belongs_to_every_public_size(real, with_sentinels, size):
    """32,128 rows: 28 more than ids, so that the table divides by 128."""
    for path in (real, with_sentinels):
        assert open_vocabulary(str(path), None, SIZES[size]).size == 32_100


@pytest.mark.parametrize("rows", [384, 8_320, 32_099, 250_112])
def test_it_is_refused_for_another_model(real, rows):
    """ByT5, the embedded base, a table too short by one, mT5."""
    with pytest.raises(ValueError, match=f"has 32100 ids, the model {rows} rows: they do not belong together"):
        open_vocabulary(str(real), None, T5Config(rows, 8, 2, 1, 1, 8))


# Bytes.

BYTE_IDS = range(3, 259)
SENTINEL_IDS = range(248, 259)  # of the bytes 0xF5 to 0xFF, which no UTF-8 has


@pytest.fixture(scope="module")
def words():
    return Vocabulary(BYTES)


@pytest.fixture(scope="module")
def theirs():
    """ByT5's vocabulary as SeqIO has it, and as transformers has it."""
    return seqio.ByteVocabulary(), ByT5Tokenizer()


@given(st.text())
def test_a_text_is_its_bytes(words, theirs, text):
    text = text.replace("<", "")  # so that nothing in it is a special token of transformers
    ids = words.encode(text)
    assert ids == theirs[0].encode(text) == theirs[1](text, add_special_tokens=False).input_ids
    assert words.decode([*ids, EOS, 3]) == words.written(text) == text


@given(st.lists(st.sampled_from(BYTE_IDS) | st.integers(0, 400), max_size=12))
@example([0xE2 + 3, 0x82 + 3, 0xAC + 3, 0xE2 + 3, 0x82 + 3, 0x41 + 3, 0xC3 + 3])
@example([0xED + 3, 0xA0 + 3, 0x80 + 3, 0xF0 + 3, 0x80 + 3, 0x80 + 3, 0x80 + 3])
def test_bytes_that_are_no_text_are_left_out(words, theirs, ids):
    """Cut, overlong and surrogate sequences, padding and unknown ids, as by SeqIO, which has no sentinels."""
    plain = [token for token in ids if token not in SENTINEL_IDS]
    assert words.decode(plain) == theirs[0].decode(plain)
    only_bytes = [token for token in plain if token in BYTE_IDS]
    assert words.decode(only_bytes) == theirs[1].decode(only_bytes)


@given(st.lists(st.sampled_from(SENTINEL_IDS) | st.text(min_size=1, max_size=4), max_size=6))
@example([258, " good", 257, 248])
def test_sentinels_are_written_apart_and_read_back(words, parts):
    """Each stands for its id and one blank behind it: any text with sentinels in it is one list of ids."""
    ids = [id for part in parts for id in ([part] if isinstance(part, int) else words.encode(part))]
    assert words.encode(words.decode(ids)) == ids


def test_sentinels_are_those_of_span_corruption(words, theirs):
    """What `vocab_size - 1 - i` is in SeqIO's preprocessors, for the sentinels that are no letter's byte too."""
    assert words.size == theirs[0].vocab_size == seqio_vocabulary(BYTES).vocab_size == 259
    assert words.encode("<extra_id_0> good") == [258, *words.encode("good")]
    assert words.decode([258, *words.encode("good"), 248, 257]) == "<extra_id_0> good<extra_id_10> <extra_id_1>"
    assert words.encode("<extra_id_11>") == theirs[0].encode("<extra_id_11>")
    assert [words.piece(i) for i in (0, 1, 2, 35, 68, 198, 258, 300)] == [
        "<pad>", "</s>", "<unk>", "<0x20>", "A", "<0xC3>", "<extra_id_0>", "<unk>",
    ]  # fmt: skip


BYTE_CONFIG = dataclasses.replace(CONFIG, vocab_size=384)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in expected_shapes(BYTE_CONFIG).items()}


def test_a_folder_says_that_its_base_reads_bytes(params, tmp_path):
    """Written here, where transformers takes it from, too; or by transformers, with a tokenizer or without."""
    ByT5Tokenizer().save_pretrained(tmp_path / "theirs")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    huggingface.write(tmp_path / "ours", BYTE_CONFIG, params, BYTES)
    t5x.write(tmp_path / "checkpoint_1", params, BYTES)
    for folder in ("theirs", "config", "ours", "checkpoint_1"):
        assert default_vocabulary(str(tmp_path / folder)) == BYTES, folder
    assert open_vocabulary(None, str(tmp_path / "ours"), BYTE_CONFIG).path == BYTES
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("é <").input_ids == [198, 172, 35, 63, EOS]
    for text in ('{"tokenizer_class": "T5Tokenizer"}', "[1]", "{"):
        (tmp_path / "config" / "config.json").write_text(text)
        assert default_vocabulary(str(tmp_path / "config")) is None
    with pytest.raises(
        ValueError,
        match=r"set `vocabulary` to its SentencePiece .model file or tokenizer.json, or to 'bytes' for ByT5$",
    ):
        open_vocabulary(None, str(tmp_path / "config"), BYTE_CONFIG)


def test_a_base_that_reads_bytes_is_tuned(params, tmp_path):
    """A user's rows, two steps of model tuning, and the model that is left, which knows its vocabulary again."""
    rows = [("ein schöner Film", "gut"), ("ein öder Film", "öde")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"inputs": text, "targets": answer}) + "\n" for text, answer in rows))
    files = TaskFiles({"train": str(file)}, labels=["öde", "gut"])
    base, lengths = tmp_path / "base", {"inputs": 20, "targets": 6}
    huggingface.write(base, BYTE_CONFIG, params, BYTES)
    data = DatasetConfig("mine", "train", 2, lengths, source=files)
    batch = data.batches(Vocabulary(BYTES))[0]
    for ids, text, answer in zip(batch.ids, batch.inputs, batch.targets, strict=True):
        read = [bytes((row[: np.argmax(row == EOS)] - 3).tolist()).decode() for row in (text, answer)]
        assert tuple(read) == rows[ids]
    config = TrainConfig(
        model_dir=str(tmp_path / "run"), size=BYTE_CONFIG, method=ModelTuning(), initial_checkpoint_path=str(base),
        train_dataset=data, eval_dataset=data, optimizer=adafactor(0.001, parameter_scale=True),
        train_steps=2, eval_period=2,
    )  # fmt: skip
    summary = train(config).summary
    assert summary["best"]["accuracy"] in (0.0, 50.0, 100.0)
    tuned = str(tmp_path / "run" / "best" / "model")
    assert default_vocabulary(tuned) == BYTES

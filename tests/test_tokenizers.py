"""Tokenizers of every kind beside transformers' own, and the few texts in which transformers and SeqIO disagree."""

import functools
import itertools
import json
import lzma
import types

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from tokenizers import (
    ByteLevelBPETokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, T5Tokenizer

from prompt_tuning_jax.batches.build import build_missing
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import check_vocabulary, default_vocabulary, expected_shapes, open_vocabulary
from prompt_tuning_jax.inference.requests import Decoding, Reader
from prompt_tuning_jax.prompts.initializers import ClassLabels, SampledVocabulary
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.preprocessors import prepend_sentinel, sentinel_ids, span_corruption
from prompt_tuning_jax.tasks.reviews import NAME, Reviews
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary
from prompt_tuning_jax.tokenizers.vocabulary import (
    BYTES,
    Vocabulary,
    vocabulary_in,
    write_vocabulary,
)

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
HARD = [
    "", " ", "a", " a", "a ", "  a", "a  ", "a  b", "a   b", "\n", "\t", "a\nb", "a\n\nb", "a\r\nb", "a\tb", " \n a ",
    "<extra_id_0>", "<extra_id_0> a", " <extra_id_0> a", "a <extra_id_0>", "a <extra_id_1> b <extra_id_99> c",
    "<extra_id_0> <extra_id_1> a", "<extra_id_0>  a", "<extra_id_100>", "<extra_id_", "extra_id_0>", "<extra_id_01>",
    "😀", "😀 film", "film 😀", "\U0001f469\u200d\U0001f467 🇹🇷", "\U0001f600\ufe0f", "e\u0301", "é", "u\u0308ber",
    "a\u0301\u0302", "\u0301", "क्षि", "a\u00a0b", "\u00a0", "a\u200bb", "\u200b", "a\u200db", "\u200e\u202eab",
    "\ufeffa", "a\u3000b", "a\u2028b", "a\u00adb", "İstanbul'da ışıklı güneş ğüşiöç", "IĞDIR ılık", "ÇALIŞMAK",
    "中文字符", "我喜欢这部电影。", "日本語のテキスト", "한국어", "русский", "العربية",
    "\x00", "a\x00b", "\x01\x07\x1b", "a\x7fb", "a\x85b", "ﬁ ﬂ Ⅷ ½ ①", "ＡＢＣ", "ｶﾞ", "~", "{x}", "`^|\\",
    "▁", "▁a", "a▁b", "▁ ▁", "\ufffd", "def f(x):\n    return x  # 1\n", "don't 'tis it's", "1,234.50 €",
    "a" * 300, "?" * 40, "https://example.com/a_b?c=d&e", "<s>", "<mask>", "< pad >",
]  # fmt: skip
SPECIAL = ["<pad>", "</s>", "<unk>", "a</s>b", "a </s> b", "a<extra_id_0>b", "<extra_id_0><extra_id_1>", "a <unk>"]


@pytest.fixture(scope="module")
def lines(data_dir):
    """1,000 lines of the shared data: reviews with their slang, and articles with names of every language."""
    found = []
    for name in ("imdb/imdb_unsup.txt.xz", "corpus/enwiki.txt.xz"):
        with lzma.open(data_dir / name, "rt", encoding="utf-8") as file:
            found.append([line.rstrip("\n")[:600] for line in itertools.islice(file, 500)])
    assert len(found[0]) + len(found[1]) == 1_000
    return found[0] + found[1]


@pytest.fixture(scope="module")
def spiece(data_dir):
    return data_dir / "t5" / "spiece.model"


@pytest.fixture(scope="module")
def folders(data_dir, lines, tmp_path_factory):
    """Folders with a tokenizer each, as the bases that ship no spiece.model have them."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, count in {"t5": 100, "umt5": 300}.items():
        T5Tokenizer.from_pretrained(data_dir / "t5", extra_ids=count).save_pretrained(root / name)
    make_codet5(root / "codet5", lines)
    AutoTokenizer.from_pretrained(root / "codet5").save_pretrained(root / "codet5p")
    model = trained_bpe(lines)
    old = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    make_llama(root / "llama", model, normalizer=old)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    make_llama(root / "pile_t5", model, pre_tokenizer=metaspace, template="$A </s>", extra=SENTINELS)
    return root


def make_codet5(folder, lines):
    """RoBERTa's files as the Salesforce/codet5 repositories have them: <extra_id_0> is the last id, by added_tokens."""
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(lines[:200], vocab_size=700, special_tokens=special, show_progress=False)
    bpe.save_model(str(folder))
    added = {text: 700 + number for number, text in enumerate(reversed(SENTINELS))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
    tokens = {f"{role}_token": {"content": text, **flags} for role, text in roles.items()}
    settings = {"tokenizer_class": "RobertaTokenizer", "additional_special_tokens": [*added], "add_prefix_space": False}
    for name, content in {
        "added_tokens.json": added,
        "special_tokens_map.json": tokens,
        "tokenizer_config.json": settings,
        "config.json": {"model_type": "t5"},
    }.items():
        (folder / name).write_text(json.dumps(content))


def trained_bpe(lines):
    """Llama's kind of BPE, with a token for each byte that no other token covers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(lines[:200], trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    return json.loads(tokenizer.to_str())["model"]


def make_llama(folder, model, normalizer=None, pre_tokenizer=None, template="<s> $A", extra=()):
    """Llama's tokenizer.json, of older and of newer form; its template ends no sequence unless it is told to."""
    folder.mkdir()
    tokenizer = Tokenizer.from_str(json.dumps({**json.loads(Tokenizer(models.BPE()).to_str()), "model": model}))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(pad_id=0, pad_token="<unk>", length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": [*extra]}
    # transformers takes the template of the file, and not what these two say.
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "umt5"}))


KINDS = ["t5", "umt5", "codet5", "codet5p", "llama", "pile_t5"]


@pytest.mark.parametrize("name", KINDS)
def test_ids_and_texts_are_those_of_transformers(folders, lines, name):
    ours, theirs = Vocabulary(vocabulary_in(folders / name)), AutoTokenizer.from_pretrained(folders / name)
    assert ours.size == len(theirs)
    assert (ours.eos_id, ours.unk_id) == (theirs.eos_token_id, theirs.unk_token_id)
    end = [] if name == "llama" else [ours.eos_id]
    texts = HARD + SPECIAL + lines
    rows = ours.encode_all(texts)
    for text, ids, expected in zip(texts, rows, theirs(texts, verbose=False).input_ids, strict=True):
        assert [*ids, *end] == expected, text
        assert ours.encode(text) == ids, text
        plain = [token for token in ids if token not in (*ours.sentinel_ids, ours.eos_id)]
        assert ours.decode([*plain, ours.eos_id, 5]) == theirs.decode(plain, skip_special_tokens=True), text


@pytest.mark.parametrize(("name", "count"), {"t5": 100, "umt5": 300, "codet5": 100, "codet5p": 100}.items())
def test_sentinels_count_down_from_the_last_id(folders, name, count):
    """As in T5 (32,099), in umT5 with 300 of them, and in CodeT5, whose 32,100 ids end in the same 100."""
    words, theirs = Vocabulary(vocabulary_in(folders / name)), AutoTokenizer.from_pretrained(folders / name)
    assert words.sentinel_ids == tuple(range(words.size - 1, words.size - 1 - count, -1))
    assert words.sentinels == count
    assert list(words.sentinel_ids) == [theirs.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(count)]
    assert words.piece(words.size - 2) == "<extra_id_1>"
    assert words.decode([words.sentinel_ids[0], *words.subwords(" fine"), words.sentinel_ids[1], words.eos_id]) == (
        "<extra_id_0> fine<extra_id_1>"
    )


def test_ids_that_no_token_has_are_left_out(folders):
    """The padding rows of a table, and ids between the tokens: as transformers' decoder does."""
    words, theirs = Vocabulary(folders / "t5" / "tokenizer.json"), AutoTokenizer.from_pretrained(folders / "t5")
    ids = [*words.encode("a film"), 32_100, 32_127]
    assert words.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a film"
    assert [words.piece(token) for token in (0, 1, 2, 3, 32_099, 32_127)] == [
        "<pad>", "</s>", "<unk>", "▁", "<extra_id_0>", "<unk>",
    ]  # fmt: skip


def test_blanks_before_punctuation_are_kept(folders, tmp_path):
    """transformers drops them on request, SeqIO never does: a metric compares with the target as it was written."""
    write_vocabulary(folders / "t5" / "tokenizer.json", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": True}))
    words, theirs = Vocabulary(tmp_path / "tokenizer.json"), AutoTokenizer.from_pretrained(tmp_path)
    ids = words.encode("a film .")
    assert theirs.decode(ids) == "a film." and words.decode(ids) == "a film ."


# SentencePiece files: SeqIO's ids, which are transformers' own but where listed.


def test_the_spiece_model_is_read_as_transformers_reads_it(spiece, lines):
    """T5Tokenizer of transformers 5 is of one kind: the slow one is gone, and with it what `legacy` changed."""
    ours, theirs = Vocabulary(spiece), T5Tokenizer.from_pretrained(spiece.parent, legacy=False)
    legacy = T5Tokenizer.from_pretrained(spiece.parent, legacy=True)
    assert legacy(HARD + SPECIAL).input_ids == theirs(HARD + SPECIAL).input_ids
    texts = [text for text in HARD + lines if text not in (*DIFFERENCES, TIE)]
    assert len(texts) > 1_070
    for ids, expected in zip(ours.encode_all(texts), theirs(texts).input_ids, strict=True):
        assert [*ids, 1] == expected
        if 2 not in ids:
            kept = [token for token in ids if token < 32_000]
            assert ours.decode(kept) == theirs.decode(kept, skip_special_tokens=True)


LETTERS = [2, 25666, 834, 23, 26, 834]  # "<extra_id_", of which "<" is no token of T5
DIFFERENCES = {
    "a<extra_id_0>b": ([3, 9, *LETTERS, 632, 3155, 115], [3, 9, 32_099, 3, 115]),
    "<extra_id_0><extra_id_1>": ([32_099, *LETTERS, 536, 3155], [32_099, 32_098]),
    "a </s>": ([3, 9, 3, 2, 87, 7, 3155], [3, 9, 1]),
    "<pad>": ([3, 2, 5612, 3155], [0]),
    "<unk>": ([3, 2, 6513, 3155], [2]),
    "a\u0301\u0302": ([3, 2975, 2], [3, 2975]),  # "á" with a circumflex, which is unknown or lost
    "e²\u0301": ([3, 15, 357, 2], [3, 15, 357]),
    "a\x85b": ([3, 9, 2, 115], [3, 9, 3, 115]),
}
TIE = "?" * 40  # 13 times "???" and one "?", which are as likely in any order


@pytest.mark.parametrize(("text", "ids"), DIFFERENCES.items())
def test_where_transformers_and_seqio_tokenise_differently(folders, spiece, text, ids):
    """spiece.model gives SeqIO's ids, which T5 was trained with; tokenizer.json gives those of transformers."""
    both = Vocabulary(spiece), Vocabulary(folders / "t5" / "tokenizer.json")
    seqios = seqio.SentencePieceVocabulary(str(spiece), extra_ids=100).encode(text)
    transformers_ids = T5Tokenizer.from_pretrained(spiece.parent)(text, add_special_tokens=False).input_ids
    assert (both[0].encode(text), both[1].encode(text)) == (seqios, transformers_ids) == ids


def test_equally_likely_splits_may_differ(folders, spiece):
    both = Vocabulary(spiece), Vocabulary(folders / "t5" / "tokenizer.json")
    assert both[0].encode(TIE) == seqio.SentencePieceVocabulary(str(spiece), extra_ids=100).encode(TIE)
    assert [sorted(words.encode(TIE)) for words in both] == [[3, 58, *[8665] * 13]] * 2


@pytest.mark.parametrize(
    ("ids", "seqios", "theirs", "from_json"),
    [
        ([3, 2, 8], " ⁇  the", " the", " the"),  # an unknown token
        ([8, 32_099, 8], "the <extra_id_0> the", "the the", "the<extra_id_0> the"),
        ([32_099, 8, 32_098], "<extra_id_0> the <extra_id_1>", "the", "<extra_id_0> the<extra_id_1>"),
    ],
)
def test_where_transformers_and_seqio_write_differently(folders, spiece, ids, seqios, theirs, from_json):
    """Sentinels are written on purpose, from either file: tasks whose answers begin with one read them."""
    assert Vocabulary(spiece).decode(ids) == seqios
    assert seqio.SentencePieceVocabulary(str(spiece), extra_ids=100).decode(ids) == seqios
    assert T5Tokenizer.from_pretrained(spiece.parent).decode(ids, skip_special_tokens=True).strip() == theirs.strip()
    assert Vocabulary(folders / "t5" / "tokenizer.json").decode(ids).strip() == from_json.strip()


def test_bytes_are_read_as_transformers_reads_them(lines):
    """Sentinels apart: those of transformers' ByT5 are ids beyond the ones that it was trained on."""
    words, theirs = Vocabulary(BYTES), ByT5Tokenizer()
    texts = [text for text in HARD + lines if "extra_id" not in text]
    assert words.encode("<extra_id_0>") == [258] and theirs("<extra_id_0>").input_ids == [259, 1]
    for text in texts:
        ids = words.encode(text)
        assert [*ids, 1] == theirs(text).input_ids
        assert words.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["spiece", BYTES, *KINDS])
def test_half_a_surrogate_pair_is_refused(folders, spiece, name):
    words = Vocabulary({"spiece": spiece, BYTES: BYTES}.get(name) or vocabulary_in(folders / name))
    for encode in (words.encode, lambda text: words.encode_all(["a film", text])):
        with pytest.raises(ValueError, match=r"'a\\ud800b' has half a surrogate pair .*, expected whole characters"):
            encode("a\ud800b")


# umT5's SentencePiece file, which has 256,000 pieces and no sentinels.


def test_tokenizer_config_says_how_many_sentinels_a_spiece_model_gets(spiece, tmp_path):
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 300}))
    words = Vocabulary(tmp_path / "spiece.model")
    assert (words.size, words.extra_ids, words.sentinels) == (32_300, 300, 300)
    assert words.encode("<extra_id_0> a <extra_id_299>") == [32_299, 3, 9, 32_000]
    assert words.fingerprint != Vocabulary(spiece).fingerprint
    assert seqio_vocabulary(words.path).encode("<extra_id_0> a <extra_id_299>") == [32_299, 3, 9, 32_000]
    converted = tmp_path / "converted"
    converted.mkdir()
    write_vocabulary(words.path, converted)
    again = Vocabulary(converted / "spiece.model")
    assert (again.size, again.fingerprint) == (words.size, words.fingerprint)
    assert len(T5Tokenizer.from_pretrained(converted)) == 32_300
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    assert (Vocabulary(tmp_path / "spiece.model").size, Vocabulary(tmp_path / "spiece.model").sentinel_ids) == (
        32_000,
        (),
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"extra_ids": 0, "additional_special_tokens": SENTINELS})
    )
    assert Vocabulary(tmp_path / "spiece.model").size == 32_100


def test_a_model_with_a_row_per_piece_has_no_sentinels(spiece, tmp_path):
    """MADLAD-400: 256,000 pieces and rows; its files say nothing of sentinels."""
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    for rows, size in {32_000: 32_000, 32_128: 32_100}.items():
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
        words = Vocabulary(tmp_path / "spiece.model")
        check_vocabulary(words, T5Config(rows, 8, 2, 1, 1, 8))
        assert (words.size, words.sentinels) == (size, size - 32_000)
        assert (words.fingerprint == Vocabulary(spiece).fingerprint) == (size == 32_100)
        assert seqio_vocabulary.__wrapped__(words.path).vocab_size == size


# Sentinels that are not the last ids.


@pytest.fixture(scope="module")
def ascending(tmp_path_factory):
    """Three sentinels in front of the words, the first one first."""
    words = ["<pad>", "</s>", "<unk>", *SENTINELS[:3], *(f"▁{chr(97 + i)}" for i in range(20))]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(words[:6])
    path = tmp_path_factory.mktemp("ascending") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_sentinels_may_lie_anywhere(ascending):
    words = Vocabulary(ascending)
    assert (words.sentinel_ids, words.sentinels, words.size) == ((3, 4, 5), 0, 26)
    assert (words.eos_id, words.unk_id, words.prefix) == (1, 2, [])
    assert [words.piece(token) for token in (4, 25)] == ["<extra_id_1>", "▁t"]
    assert words.encode("<extra_id_0> a b <extra_id_2>") == [3, 6, 7, 5]
    assert words.decode([3, 6, 7, 5, 1, 6]) == "<extra_id_0> a b<extra_id_2>"


def one_example(steps, vocabulary, tokens):
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    dataset = tf.data.Dataset.from_tensors({"targets": tf.constant(tokens, tf.int32)})
    for step, more in steps:
        dataset = step(dataset, output_features=features, **more)
    return next(iter(dataset.as_numpy_iterator()))


def test_span_corruption_takes_the_tokenizers_sentinels(ascending):
    """Half of 16 tokens in 8 spans, but there are 3 sentinels: 3 spans, and the source can be spliced again."""
    vocabulary = seqio_vocabulary(str(ascending))
    tokens = [*range(6, 22)]
    lengths = {"sequence_length": {"inputs": 32, "targets": 32}}
    with seqio.utils.map_seed_manager(0):
        found = one_example([(span_corruption(0.5, 1.0), lengths)], vocabulary, tokens)
    assert [token for token in found["inputs"] if token < 6] == [3, 4, 5]
    assert [token for token in found["targets"] if token < 6] == [3, 4, 5]
    spans = {3: [], 4: [], 5: []}
    span = []
    for token in found["targets"].tolist():
        if token < 6:
            span = spans[token]
        else:
            span.append(token)
    assert [token for kept in found["inputs"].tolist() for token in spans.get(kept, [kept])] == tokens


def test_a_sentinel_in_front_is_the_tokenizers(ascending, folders):
    """`sentinel_` and `task_index_` tasks, of which a tokenizer without sentinels has none."""
    vocabulary = seqio_vocabulary(str(ascending))
    assert one_example([(prepend_sentinel("targets", 2), {})], vocabulary, [7])["targets"].tolist() == [5, 7]
    with pytest.raises(ValueError, match="the tokenizer has 3 sentinels .*, and the task needs 4"):
        one_example([(prepend_sentinel("targets", 3), {})], vocabulary, [7])
    with pytest.raises(ValueError, match="the tokenizer has 0 sentinels"):
        sentinel_ids(seqio_vocabulary(str(folders / "llama" / "tokenizer.json")))
    assert list(sentinel_ids(seqio.ByteVocabulary()))[:2] == [258, 257]


# SeqIO.


@pytest.mark.parametrize("name", ["t5", "codet5", "pile_t5"])
def test_seqio_gets_the_same_ids(folders, lines, name):
    path = vocabulary_in(folders / name)
    words, theirs = Vocabulary(path), seqio_vocabulary(path)
    assert (theirs.vocab_size, theirs.eos_id, theirs.unk_id) == (words.size, words.eos_id, words.unk_id)
    texts = [*HARD, *lines[::20]]
    dataset = tf.data.Dataset.from_tensor_slices({"inputs": texts, "targets": texts})
    features = {feature: seqio.Feature(theirs, add_eos=True) for feature in ("inputs", "targets")}
    dataset = seqio.preprocessors.tokenize(dataset, features, with_eos=True)
    for text, found in zip(texts, dataset.as_numpy_iterator(), strict=True):
        assert found["inputs"].tolist() == [*words.encode(text), words.eos_id], text
    rows = theirs.encode_tf(tf.constant(texts))
    assert rows.to_list() == words.encode_all(texts)
    for text, row in zip(texts, rows.to_list(), strict=True):
        assert theirs.encode(text) == row
        assert theirs.decode([*row, words.eos_id, 5]) == words.decode(row)
    some = tf.constant([[*words.encode("a film"), words.eos_id, 5], [*words.encode("a film")] + [words.eos_id] * 2])
    assert [text.decode() for text in theirs.decode_tf(some).numpy()] == ["a film"] * 2
    assert theirs.decode_tf(some[0]).numpy() == b"a film"
    assert theirs == type(theirs)(Vocabulary(path)) != seqio_vocabulary(BYTES)


def test_a_registered_task_is_tokenised_by_it(folders, tmp_path):
    """The cache that SeqIO writes has the tokens of the same rows in memory."""
    words = Vocabulary(folders / "t5" / "tokenizer.json")
    build_missing(TaskRequest(NAME, words.path, {"inputs": 48, "targets": 8}), "unseen_words", tmp_path, False)
    config = functools.partial(DatasetConfig, NAME, "unseen_words", 32, {"inputs": 48, "targets": 8})
    both = (config(source=Reviews()), config(cache_dir=str(tmp_path)))
    (ours,), (theirs,) = (one.eval_batches(words).values() for one in both)
    assert ours.examples.token_fingerprint() == theirs.examples.token_fingerprint()
    assert len(ours.examples) > 100


def test_bytes_that_are_no_text_become_a_replacement_character(folders):
    """TensorFlow's strings are bytes."""
    theirs = seqio_vocabulary(vocabulary_in(folders / "codet5"))
    assert theirs.encode_tf(tf.constant(b"a\xff b")).numpy().tolist() == theirs.encode("a\ufffd b")


# In the folder of a base.


def test_which_tokenizer_of_a_folder_is_read(folders, spiece, tmp_path):
    def found():
        path = vocabulary_in(tmp_path)
        return path and path.removeprefix(f"{tmp_path}/")

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (tmp_path / "vocab.json").write_bytes((folders / "codet5" / "vocab.json").read_bytes())
    assert found() == BYTES
    (tmp_path / "merges.txt").write_bytes((folders / "codet5" / "merges.txt").read_bytes())
    assert found() == "vocab.json"
    (tmp_path / "tokenizer.json").write_bytes((folders / "t5" / "tokenizer.json").read_bytes())
    assert found() == "tokenizer.json"
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    assert found() == "spiece.model"


@pytest.mark.parametrize(
    ("name", "files"),
    {
        "t5": {"tokenizer.json", "tokenizer_config.json"},
        "pile_t5": {"tokenizer.json", "tokenizer_config.json"},
        "codet5": {
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
            "special_tokens_map.json",
            "tokenizer_config.json",
        },
    }.items(),
)
def test_a_tokenizer_is_copied_beside_a_base(folders, tmp_path, name, files):
    """The files of this kind and no others, where transformers and this project find them."""
    words = Vocabulary(vocabulary_in(folders / name))
    config = T5Config(words.size + 28, 8, 2, 1, 1, 8, eos_token_id=words.eos_id)
    params = {path: np.zeros(shape, np.float32) for path, shape in expected_shapes(config).items()}
    huggingface.write(tmp_path / "base", config, params, words.path)
    assert {file.name for file in (tmp_path / "base").iterdir()} == {"config.json", "model.safetensors", *files}
    again = open_vocabulary(None, str(tmp_path / "base"), config)
    assert again.path == default_vocabulary(str(tmp_path / "base"))
    assert again.fingerprint == words.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    for text in HARD + SPECIAL:
        assert [*again.encode(text), again.eos_id] == theirs(text).input_ids


def test_a_tokenizer_file_may_have_any_name(folders, tmp_path):
    """VOCABULARY names it; nothing has to lie beside it."""
    (tmp_path / "mine.json").write_bytes((folders / "t5" / "tokenizer.json").read_bytes())
    words = Vocabulary(tmp_path / "mine.json")
    assert (words.encode("a film"), words.eos_id, words.unk_id, words.size) == ([3, 9, 814], 1, 2, 32_100)


def test_the_fingerprint_covers_every_file(folders, tmp_path):
    write_vocabulary(vocabulary_in(folders / "codet5"), tmp_path)
    prints = {Vocabulary(tmp_path / "vocab.json").fingerprint}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        prints.add(Vocabulary(tmp_path / "vocab.json").fingerprint)
    merges = (tmp_path / "merges.txt").read_text().splitlines(keepends=True)
    (tmp_path / "merges.txt").write_text("".join(merges[:-1]))
    prints.add(Vocabulary(tmp_path / "vocab.json").fingerprint)
    assert len(prints) == 6


# What begins every text.


def test_what_begins_a_text_is_no_part_of_a_label(folders):
    """CodeT5's <s>: in front of inputs and targets, as in transformers, and not in a prompt's start."""
    words = Vocabulary(vocabulary_in(folders / "codet5"))
    assert words.prefix == [1] and words.encode("")[0] == 1 and words.subwords("") == []
    assert words.written("good") == "good"
    table = np.random.default_rng(0).normal(size=(words.size, 4)).astype(np.float32)
    model = types.SimpleNamespace(config=types.SimpleNamespace(emb_dim=4), embeddings=table, tokenizer=words)
    prompt = ClassLabels(["good"])(jax.random.key(0), 1, model)
    np.testing.assert_allclose(prompt[0], table[words.encode("good")[1:]].mean(axis=0), atol=1e-6)
    reader = Reader(words, 16, Decoding())
    with pytest.raises(ValueError, match="label '' has 0 tokens"):
        reader.request({"prompt": None, "inputs": "a film", "labels": [""]}, 0)


def test_special_tokens_do_not_start_a_prompt(ascending, folders):
    """CodeT5's <unk> and <mask> are ids 3 and 4; and sentinels wherever they lie."""
    words = Vocabulary(vocabulary_in(folders / "codet5"))
    assert words.special_ids == {0, 1, 2, 3, 4, *range(700, 800)}
    assert Vocabulary(ascending).special_ids == {0, 1, 2, 3, 4, 5}
    for tokenizer, ids in ((words, range(5, 700)), (Vocabulary(ascending), range(6, 26))):
        table = np.arange(tokenizer.size, dtype=np.float32)[:, None]
        model = types.SimpleNamespace(config=types.SimpleNamespace(emb_dim=1), embeddings=table, tokenizer=tokenizer)
        prompt = SampledVocabulary()(jax.random.key(0), len(ids), model)
        assert sorted(prompt[:, 0].astype(int).tolist()) == [*ids]


# What cannot be read.


def test_files_that_are_no_tokenizer_are_refused_by_name(folders, tmp_path):
    whole = (folders / "codet5" / "vocab.json").read_text()
    path = tmp_path / "vocab.json"
    for text, message in {
        "{": "vocab.json is not a JSON object: set `vocabulary`",
        whole: "vocab.json is neither a tokenizer.json nor a vocab.json with merges.txt beside it: set `vocabulary`",
        '{"model": {"type": "Nope"}}': "vocab.json cannot be read as a tokenizer (.*): set `vocabulary`",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Vocabulary(path)
    with pytest.raises(
        ValueError, match=r"expected a SentencePiece .model file, a tokenizer.json, or 'bytes' for ByT5"
    ):
        Vocabulary(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "is the vocabulary of a BertTokenizer, expected a RobertaTokenizer"),
        (
            {"added_tokens_decoder": {"800": {"content": "<extra_id_0>", "special": True}}},
            "gives '<extra_id_0>' the id 700, and the files beside it 800",
        ),
        ({"eos_token": 2}, r"tokenizer_config.json has tokens that are no texts with flags \(eos_token\)"),
        ({"eos_token": {"text": "</s>"}}, r"no texts with flags \(eos_token\)"),
        ({"additional_special_tokens": "<a>"}, r"no texts with flags \(additional_special_tokens\)"),
        ({"added_tokens_decoder": {"x": "<a>"}}, r"no texts with flags \(added_tokens_decoder\)"),
        ({"added_tokens_decoder": [1]}, r"no texts with flags \(added_tokens_decoder\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folders, tmp_path, settings, message):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders / "codet5" / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        Vocabulary(tmp_path / "vocab.json")


def test_a_tokenizer_that_ends_nothing_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    message = "does not say which token ends a sequence: write its eos_token into tokenizer_config.json beside it"
    with pytest.raises(ValueError, match=message):
        Vocabulary(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert Vocabulary(tmp_path / "tokenizer.json").eos_id == 2

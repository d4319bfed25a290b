"""SentencePiece vocabularies with their 100 sentinels, whether the file has them or not, and the models they fit."""

import pytest
import seqio
from sentencepiece import sentencepiece_model_pb2

from prompt_tuning_jax.t5.config import SIZES, T5Config
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.start import open_vocabulary

TEXT = "Prompt tuning adds 100 vectors, and no more."


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

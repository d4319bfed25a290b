"""Tokenizers as SeqIO vocabularies, with the ids that `Vocabulary` gives."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.tokenizers.vocabulary import BYTES, Vocabulary


class TokenizerVocabulary(seqio.Vocabulary):
    """A SeqIO vocabulary that encodes in Python with `tf.numpy_function`, as TensorFlow has no op for these tokenizers.

    Attributes:
      path: the path of the tokenizer's file.
      sentinel_ids: the ids of <extra_id_0>, <extra_id_1> and so on, in any position.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        self._vocabulary = vocabulary
        self.path, self.sentinel_ids = vocabulary.path, vocabulary.sentinel_ids

    @property
    def eos_id(self) -> int:
        return self._vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        return self._vocabulary.unk_id

    @property
    def _base_vocab_size(self) -> int:
        return self._vocabulary.size

    def _encode(self, s: str) -> Sequence[int]:
        return self._vocabulary.encode(s)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._vocabulary.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        """Returns the ids of a text, or of each text of a vector, as a ragged tensor."""

        def rows(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            # Bytes that are not UTF-8 become U+FFFD, as in SentencePiece.
            found = self._vocabulary.encode_all([text.decode("utf-8", errors="replace") for text in texts])
            lengths = np.array([len(row) for row in found], np.int64)
            return np.array([token for row in found for token in row], np.int32), lengths

        values, lengths = tf.numpy_function(rows, [tf.reshape(s, [-1])], (tf.int32, tf.int64))
        values, lengths = tf.ensure_shape(values, [None]), tf.ensure_shape(lengths, [None])
        if s.shape.rank == 0:
            return values
        if s.shape.rank == 1:
            return tf.RaggedTensor.from_row_lengths(values, lengths)
        raise ValueError(f"found a tensor of {s.shape.rank} dimensions, expected a text or a vector of texts")

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Returns the text of a vector of ids, or of each row of a matrix."""

        def texts(rows: np.ndarray) -> np.ndarray:
            return np.array([self._vocabulary.decode(row).encode() for row in rows], object)

        rows = tf.reshape(ids, [-1, tf.shape(ids)[-1]])
        return tf.reshape(tf.numpy_function(texts, [rows], tf.string), tf.shape(ids)[:-1])

    def __eq__(self, other: object) -> bool:
        """Compares the tokenizers, because SeqIO checks that the tasks of a mixture have the same vocabulary."""
        return isinstance(other, TokenizerVocabulary) and other._vocabulary.fingerprint == self._vocabulary.fingerprint

    def __hash__(self) -> int:
        return hash(self._vocabulary.fingerprint)


@functools.cache
def seqio_vocabulary(path: str, eos_id: int | None = None) -> seqio.Vocabulary:
    """Returns the tokenizer as a SeqIO vocabulary, with the ids that `Vocabulary` gives.

    Args:
      path: of the tokenizer's file, or "bytes".
      eos_id: the model's end of sequence; None for the tokenizer's own.
    """
    vocabulary = Vocabulary(path, eos_id=eos_id)
    if vocabulary.reads_json:
        return TokenizerVocabulary(vocabulary)
    if path == BYTES:
        found = seqio.ByteVocabulary()
    else:
        found = seqio.SentencePieceVocabulary(path, extra_ids=vocabulary.extra_ids)
    if vocabulary.eos_id == found.eos_id:
        return found
    # SeqIO's preprocessors read the end of sequence here.
    ended: Any = type(f"{type(found).__name__}WithEnd", (type(found),), {"eos_id": vocabulary.eos_id})
    return ended() if path == BYTES else ended(path, extra_ids=vocabulary.extra_ids)

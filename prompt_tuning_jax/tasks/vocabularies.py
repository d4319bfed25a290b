"""SentencePiece vocabularies as T5 uses them: 0 pads, 1 ends, 2 is unknown, sentinels count down from the top."""

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

PAD, EOS, UNK = 0, 1, 2
EXTRA_IDS = 100


class Vocabulary:
    """A `.model` file with `EXTRA_IDS` sentinels after its pieces; no TensorFlow.

    `<extra_id_0>` is the last id, `size - 1`, as in T5. A file may have the sentinels as its last pieces already, as
    mT5's and T5X's `cc_all.32000.100extra` have.

    Attributes:
      size: pieces and sentinels; a model's table may have more rows.
      extra_ids: sentinels that are not in the file: `EXTRA_IDS`, or 0.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"no vocabulary at {path} ({error.strerror}); expected a SentencePiece .model file: set VOCABULARY"
            ) from None
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model: set VOCABULARY to a .model file") from None
        pieces = self._pieces.vocab_size()
        self.extra_ids = 0 if pieces and self._pieces.id_to_piece(pieces - 1).endswith("<extra_id_0>") else EXTRA_IDS
        self.size = pieces + self.extra_ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of sequence."""
        return self._pieces.encode(text)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids` up to the first end of sequence; padding is skipped and sentinels are written out.

        An id beyond the sentinels, which a model's padded table can give, is unknown.
        """
        text: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if token == EOS:
                break
            if token >= self.size:
                token = UNK
            if token >= self.size - EXTRA_IDS:
                text += [self._pieces.decode(run), f"<extra_id_{self.size - 1 - token}>"]
                run = []
            elif token != PAD:
                run.append(token)
        return " ".join(part for part in [*text, self._pieces.decode(run)] if part)

    def piece(self, token: int) -> str:
        """How one id is written, for tables of nearest neighbours."""
        if token >= self.size:
            token = UNK
        sentinel = token >= self.size - EXTRA_IDS
        return f"<extra_id_{self.size - 1 - token}>" if sentinel else self._pieces.id_to_piece(token)

    def written(self, text: str) -> str:
        """`text` as this vocabulary gives it back: a case-folding one writes True as true."""
        return self.decode(self.encode(text))


@functools.cache
def seqio_vocabulary(path: str):
    """The same vocabulary for a SeqIO task (imports TensorFlow)."""
    import seqio

    return seqio.SentencePieceVocabulary(path, extra_ids=Vocabulary(path).extra_ids)


def trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length` tokens, the last of them replaced by `tokens`' own last (its end of sequence)."""
    return tokens if len(tokens) <= length else np.append(tokens[: length - 1], tokens[-1])

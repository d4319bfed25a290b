"""Vocabularies as T5 uses them: 0 pads, 1 ends, 2 is unknown, sentinels count down from the top.

SentencePiece's, or the bytes of ByT5 (Xue et al. 2021, https://arxiv.org/abs/2105.13626).
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from prompt_tuning_jax.errors import Setting, SettingError

PAD, EOS, UNK = 0, 1, 2
EXTRA_IDS = 100
BYTES = "bytes"  # in place of a path
BESIDE = "spiece.model"  # what the file is called that lies beside a base
_USER_DEFINED = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED


class Vocabulary:
    """The vocabulary of a base, without TensorFlow: a SentencePiece `.model` file, or `BYTES`.

    `<extra_id_0>` is the last id, `size - 1`, as in T5. A file may have the sentinels as its last pieces already, as
    mT5's and T5X's `cc_all.32000.100extra` have; to others they are added as SeqIO adds them.

    Attributes:
      path: of the file, or `BYTES`.
      size: ids, sentinels included; a model's table may have more rows.
      sentinels: how many of the last ids are written as sentinels.
      extra_ids: sentinels that are not in the file: `EXTRA_IDS`, or 0.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self.extra_ids, self.sentinels = 0, EXTRA_IDS
        if self.path == BYTES:
            self._pieces, self.fingerprint = _Bytes(), BYTES
            self.size, self.sentinels = _Bytes.SIZE, _Bytes.SENTINELS
            return
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise SettingError(
                f"no vocabulary at {path} ({error.strerror}); expected a SentencePiece .model file, or {BYTES!r} for "
                "ByT5: set ",
                Setting("vocabulary"),
            ) from None
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(data)
            if not (model.pieces and model.pieces[-1].piece.endswith("<extra_id_0>")):
                self.extra_ids = EXTRA_IDS
            for i in reversed(range(self.extra_ids)):
                model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=_USER_DEFINED)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (DecodeError, RuntimeError):
            raise SettingError(
                f"{path} is not a SentencePiece model: set ", Setting("vocabulary"), " to a .model file"
            ) from None
        self.size = self._pieces.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of sequence; a sentinel at the start of a word is one id."""
        return self._pieces.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on all processor cores."""
        if isinstance(self._pieces, _Bytes):
            return [*map(self._pieces.encode, texts)]
        return self._pieces.encode(list(texts))

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of `ids` up to the first end of sequence; padding is skipped and sentinels are written out.

        An id beyond the sentinels, which a model's padded table can give, is unknown.
        """
        found = [*map(int, ids)]
        found = found[: found.index(EOS)] if EOS in found else found
        return self._pieces.decode([token if token < self.size else UNK for token in found])

    def piece(self, token: int) -> str:
        """How one id is written, for tables of nearest neighbours."""
        if token >= self.size:
            token = UNK
        sentinel = token >= self.size - self.sentinels
        return f"<extra_id_{self.size - 1 - token}>" if sentinel else self._pieces.id_to_piece(token)

    def written(self, text: str) -> str:
        """`text` as this vocabulary gives it back: a case-folding one writes True as true."""
        return self.decode(self.encode(text))


class _Bytes:
    """The ids of ByT5 behind the methods of a SentencePieceProcessor: byte b of UTF-8 is b + 3.

    ByT5 has no ids for sentinels: in span corruption the last ids stand for them, 258 for the first. Of those, the
    eleven whose bytes no UTF-8 text has, 0xF5 to 0xFF, are written out here, with a blank behind them that is none of
    the text's. The `<extra_id_0>` of Hugging Face's tokenizer is another id, 259, which ByT5 was not trained on.
    """

    SIZE, FIRST, SENTINELS = 259, 3, 11

    def encode(self, text: str) -> list[int]:
        parts = re.split(r"<extra_id_(10|[0-9])> ?", text)
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += [self.SIZE - 1 - int(part)] if place % 2 else [byte + self.FIRST for byte in part.encode("utf-8")]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8, and unknown ids, are left out, as SeqIO has it."""
        data = bytes(token - self.FIRST for token in ids if token >= self.FIRST)
        parts = re.split(rb"([\xf5-\xff])", data)
        texts = [
            f"<extra_id_{0xFF - part[0]}> " if place % 2 else part.decode("utf-8", errors="ignore")
            for place, part in enumerate(parts)
        ]
        return "".join(texts) if texts[-1] else "".join(texts).removesuffix(" ")

    def id_to_piece(self, token: int) -> str:
        if token < self.FIRST:
            return ("<pad>", "</s>", "<unk>")[token]
        byte = token - self.FIRST
        return chr(byte) if 0x20 < byte < 0x7F else f"<0x{byte:02X}>"


def vocabulary_in(folder: str | os.PathLike) -> str | None:
    """The SentencePiece model that lies in the folder of a base, or `BYTES` where Hugging Face's files say ByT5."""
    found = Path(folder, BESIDE)
    if found.is_file():
        return str(found)
    for name in ("tokenizer_config.json", "config.json"):
        try:
            settings = json.loads(Path(folder, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(settings, dict) and settings.get("tokenizer_class") == "ByT5Tokenizer":
            return BYTES
    return None


def write_vocabulary(vocabulary: str | os.PathLike, folder: Path) -> None:
    """Puts a vocabulary into the folder of a base, where `vocabulary_in` and transformers find it."""
    if str(vocabulary) == BYTES:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}) + "\n")
    else:
        shutil.copyfile(vocabulary, folder / BESIDE)


@functools.cache
def seqio_vocabulary(path: str):
    """The same vocabulary for a SeqIO task (imports TensorFlow)."""
    import seqio

    if path == BYTES:
        return seqio.ByteVocabulary()
    return seqio.SentencePieceVocabulary(path, extra_ids=Vocabulary(path).extra_ids)


def trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length` tokens, the last of them replaced by `tokens`' own last (its end of sequence)."""
    return tokens if len(tokens) <= length else np.append(tokens[: length - 1], tokens[-1])

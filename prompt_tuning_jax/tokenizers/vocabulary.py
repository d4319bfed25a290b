"""Encodes and decodes text with the vocabularies of T5 models: SentencePiece, ByT5's bytes, or a `tokenizer.json`.

In T5's own vocabulary, 0 is padding, 1 is the end of sequence, 2 is the unknown token, and sentinels count down from
the last id. ByT5: Xue et al. 2021, https://arxiv.org/abs/2105.13626.

SentencePiece files and bytes are read as SeqIO reads them, because T5 was trained with SeqIO. A `tokenizer.json` is
read as transformers 5 reads it, with or without `legacy`. For the same SentencePiece file, the two differ in these
ways:
  - A sentinel within a word, or directly after another sentinel, is one id in transformers. SeqIO splits it like text.
  - A combining mark after another one, or on a character that normalisation replaces, may be lost in transformers,
    because it normalises per grapheme.
  - The control character U+0085 is unknown in SeqIO, and a space in transformers.
  - If two ways to split a text are equally likely, as for 40 question marks, the two may choose different ones. So may
    SentencePiece and the TensorFlow Text within SeqIO.
  - "</s>", "<pad>" and "<unk>" in a text become the special ids in transformers. SeqIO splits them like text.
  - SeqIO decodes an unknown id as " \u2047 "; transformers leaves it out.
  - SeqIO writes a space in front of a sentinel within a text; the decoder of `tokenizer.json` does not.
Here both write sentinels when decoding, because tasks read them. In transformers, `skip_special_tokens=True` would
leave them out.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.regular_files import regular
from prompt_tuning_jax.tokenizers import tokenizer_json
from prompt_tuning_jax.tokenizers.tokenizer_json import TokenizerFile, declared_sentinels, sentinels_in

PAD, EOS, UNK = 0, 1, 2
EXTRA_IDS = 100
BYTES = "bytes"  # given instead of a path
BESIDE = "spiece.model"  # the name of the SentencePiece file beside a base model
SETTINGS = "tokenizer_config.json"
_LAYOUTS = ((BESIDE,), (tokenizer_json.TOKENIZER,), (tokenizer_json.VOCAB, tokenizer_json.MERGES))
_USER_DEFINED = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED


class Vocabulary:
    """A base model's tokenizer, without TensorFlow: a SentencePiece `.model`, a `tokenizer.json`, or `BYTES`.

    Some SentencePiece files have the sentinels already, as mT5's and T5X's `cc_all.32000.100extra` do. To other files
    they are added as SeqIO adds them, so that `<extra_id_0>` is the last id. Their number is the one in the
    `tokenizer_config.json` beside the file (300 for umT5), or else 100; or 0 if the `config.json` beside the file says
    that the model's table has exactly one row per subword of the file (MADLAD-400). The `vocab.json` of CodeT5 is read
    with the `merges.txt` beside it.

    Attributes:
      path: the path of the file, or `BYTES`.
      fingerprint: a hash of the tokenizer's files, and of ids that were set otherwise.
      size: the number of ids, including sentinels; a model's embedding table may have more rows.
      sentinel_ids: the ids of <extra_id_0>, <extra_id_1> and so on; empty if the tokenizer has none.
      sentinels: how many of the last ids are sentinels.
      extra_ids: the number of sentinels that were added to those in the file.
      special_ids: ids that stand for no text: padding, the end of sequence, <mask> and the like, and the sentinels.
      pad_id: the id of padding.
      eos_id: the id of the end of sequence.
      start_id: the id that the decoder reads first.
      unk_id: the id of the unknown token, or None if the tokenizer can encode every text.
      prefix: the ids in front of every text, such as CodeT5's <s>; empty for T5.
      reads_json: whether the tokenizer is read with Hugging Face's `tokenizers` library.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        pad_id: int | None = None,
        eos_id: int | None = None,
        start_id: int | None = None,
    ):
        """Reads the tokenizer.

        Args:
          path: the path of the file, or `BYTES`.
          pad_id, eos_id, start_id: the model's ids, which replace those of the tokenizer. None means the tokenizer's
            end of sequence, and T5X's padding and start, which are 0 for every tokenizer.

        Raises:
          ValueError: there is no tokenizer at `path`.
        """
        self.path = str(path)
        self.extra_ids, self.prefix, self.reads_json = 0, [], False
        self.eos_id: int = EOS
        self.unk_id: int | None = UNK
        self._open()
        self.pad_id, self.start_id = pad_id or PAD, start_id or PAD
        if eos_id is not None and eos_id != self.eos_id:
            self.eos_id = eos_id
            self.fingerprint += f"+eos{eos_id}"

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        if isinstance(self._pieces, TokenizerFile):
            own = self._pieces.special_ids
        elif isinstance(self._pieces, sentencepiece.SentencePieceProcessor):
            numbers = range(self.size)
            own = {n for n in numbers if self._pieces.IsControl(n) or self._pieces.IsUnknown(n)}
        else:
            own = {PAD, EOS, UNK}
        return frozenset({*own, *self.sentinel_ids, self.pad_id, self.eos_id, self.start_id})

    def _open(self) -> None:
        if self.path == BYTES:
            self._pieces, self.fingerprint = _Bytes(), BYTES
            self.size = _Bytes.SIZE
            self._has_sentinels(range(self.size - 1, self.size - 1 - _Bytes.SENTINELS, -1))
            return
        try:
            data = regular(self.path).read_bytes()
        except OSError as error:
            raise SettingError(
                f"no vocabulary at {self.path} ({error.strerror}); expected a SentencePiece .model file, a "
                f"{tokenizer_json.TOKENIZER}, or {BYTES!r} for ByT5: set ",
                Setting("vocabulary"),
            ) from None
        if data.lstrip()[:1] == b"{":
            self._open_tokenizer_file()
        else:
            self._open_sentencepiece(data)

    def _open_sentencepiece(self, data: bytes) -> None:
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        try:
            model = sentencepiece_model_pb2.ModelProto.FromString(data)
            if b"<extra_id_0>" not in data:
                self.extra_ids = _sentinels_to_add(Path(self.path).parent, len(model.pieces))
                if self.extra_ids != EXTRA_IDS:
                    self.fingerprint += f"+{self.extra_ids}"
            for i in reversed(range(self.extra_ids)):
                model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=_USER_DEFINED)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (DecodeError, RuntimeError):
            raise SettingError(
                f"{self.path} is not a SentencePiece model: set ", Setting("vocabulary"), " to a .model file"
            ) from None
        self.size = self._pieces.vocab_size()
        if (eos := self._pieces.eos_id()) >= 0:
            self.eos_id = eos
        self.unk_id = self._pieces.unk_id()
        self._has_sentinels(sentinels_in(self._number))

    def _open_tokenizer_file(self) -> None:
        self._pieces, self.reads_json = TokenizerFile(self.path), True
        self.size, self.prefix = self._pieces.size, self._pieces.prefix
        self.eos_id, self.unk_id = self._pieces.eos_id, self._pieces.unk_id
        self._has_sentinels(self._pieces.sentinel_ids)
        digest = hashlib.sha256()
        for file in self._pieces.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        self.fingerprint = digest.hexdigest()[:16]

    def _number(self, piece: str) -> int | None:
        """Returns the id of a SentencePiece subword, or None if there is no such subword."""
        number = self._pieces.piece_to_id(piece)
        return number if self._pieces.id_to_piece(number) == piece else None

    def _has_sentinels(self, ids: Iterable[int]) -> None:
        self.sentinel_ids = tuple(ids)
        self._written = {token: f"<extra_id_{i}>" for i, token in enumerate(self.sentinel_ids)}
        self.sentinels = next(n for n in range(self.size + 1) if self.size - 1 - n not in self._written)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without an end of sequence. A sentinel at the start of a word is one id.

        Raises:
          ValueError: `text` has half a surrogate pair, which no file can hold.
        """
        with _whole_characters([text]):
            return self._pieces.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does, using all CPU cores."""
        with _whole_characters(texts):
            if isinstance(self._pieces, sentencepiece.SentencePieceProcessor):
                return self._pieces.encode(list(texts))
            return self._pieces.encode_all(texts)

    def subwords(self, text: str) -> list[int]:
        """Returns the ids of `text` without `prefix`."""
        return self.encode(text)[len(self.prefix) :]

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Returns the text of `ids` up to the first end of sequence, without padding but with sentinels.

        An id from `size` on counts as unknown. A model can generate such ids if its embedding table is padded.
        """
        found = [*map(int, ids)]
        found = found[: found.index(self.eos_id)] if self.eos_id in found else found
        known = [token if token < self.size else self.unk_id for token in found if token != self.pad_id]
        return self._pieces.decode([token for token in known if token is not None])

    def piece(self, token: int) -> str:
        """Returns the subword of one id, as it is shown in tables of nearest neighbours."""
        if token >= self.size:
            if self.unk_id is None:
                return "<unk>"
            token = self.unk_id
        return self._written.get(token) or self._pieces.id_to_piece(token)

    def written(self, text: str) -> str:
        """Returns `text` after encoding and decoding; a case-folding vocabulary turns "True" into "true"."""
        return self.decode(self.encode(text))


@contextlib.contextmanager
def _whole_characters(texts: Sequence[str]) -> Iterator[None]:
    """Replaces a tokenizer's own error by a ValueError if a text has half a surrogate pair."""
    try:
        yield
    except (RuntimeError, TypeError, UnicodeEncodeError):
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                shown = text if len(text) <= 60 else text[:60] + "..."
                raise ValueError(
                    f"{shown!r} has half a surrogate pair (\\ud800 to \\udfff), expected whole characters"
                ) from None
        raise


class _Bytes:
    """ByT5's tokenizer with the methods of a SentencePieceProcessor. Byte b of UTF-8 has the id b + 3.

    ByT5 has no ids for sentinels: in span corruption it uses the last ids for them, starting with 258. Eleven of these
    ids stand for bytes that never occur in UTF-8, 0xF5 to 0xFF, so here they are decoded as sentinels, each followed by
    a space that is not part of the text. In Hugging Face's tokenizer, `<extra_id_0>` has another id, 259, with which
    ByT5 was not trained.
    """

    SIZE, FIRST, SENTINELS = 259, 3, 11

    def encode(self, text: str) -> list[int]:
        parts = re.split(r"<extra_id_(10|[0-9])> ?", text)
        ids: list[int] = []
        for index, part in enumerate(parts):
            ids += [self.SIZE - 1 - int(part)] if index % 2 else [byte + self.FIRST for byte in part.encode("utf-8")]
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [*map(self.encode, texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`. Invalid UTF-8 and unknown ids are left out, as in SeqIO."""
        data = bytes(token - self.FIRST for token in ids if token >= self.FIRST)
        parts = re.split(rb"([\xf5-\xff])", data)
        texts = [
            f"<extra_id_{0xFF - part[0]}> " if index % 2 else part.decode("utf-8", errors="ignore")
            for index, part in enumerate(parts)
        ]
        return "".join(texts) if texts[-1] else "".join(texts).removesuffix(" ")

    def id_to_piece(self, token: int) -> str:
        if token < self.FIRST:
            return ("<pad>", "</s>", "<unk>")[token]
        byte = token - self.FIRST
        return chr(byte) if 0x20 < byte < 0x7F else f"<0x{byte:02X}>"


def _sentinels_to_add(folder: Path, pieces: int) -> int:
    """Returns how many sentinels to add to a SentencePiece model, according to the files beside it."""
    if (declared := declared_sentinels(folder)) is not None:
        return declared
    return 0 if read_settings(folder / "config.json").get("vocab_size") == pieces else EXTRA_IDS


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if the file does not exist or has something else."""
    try:
        found = json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def vocabulary_in(folder: str | os.PathLike) -> str | None:
    """Returns the path of the tokenizer in a base model's folder, `BYTES` if Hugging Face's files say ByT5, or None.

    A SentencePiece model is preferred, then `tokenizer.json`, then `vocab.json` with `merges.txt`.
    """
    for name, *others in _LAYOUTS:
        if all(Path(folder, one).is_file() for one in (name, *others)):
            return str(Path(folder, name))
    settings = (read_settings(Path(folder, name)) for name in (SETTINGS, "config.json"))
    return BYTES if any(found.get("tokenizer_class") == "ByT5Tokenizer" for found in settings) else None


def write_vocabulary(vocabulary: str | os.PathLike, folder: Path) -> None:
    """Writes a vocabulary to a base model's folder, so that `vocabulary_in` and transformers find it."""
    if str(vocabulary) == BYTES:
        (folder / SETTINGS).write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}) + "\n")
        return
    source = Path(vocabulary)
    with regular(source).open("rb") as file:
        is_json = file.read(64).lstrip()[:1] == b"{"
    if not is_json:
        shutil.copyfile(source, folder / BESIDE)
        if (count := declared_sentinels(source.parent)) is not None and count != EXTRA_IDS:
            settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": count}
            (folder / SETTINGS).write_text(json.dumps(settings) + "\n")
        return
    with_merges = tokenizer_json.is_vocabulary(source)
    shutil.copyfile(source, folder / (tokenizer_json.VOCAB if with_merges else tokenizer_json.TOKENIZER))
    beside = (tokenizer_json.MERGES, tokenizer_json.ADDED) if with_merges else ()
    for name in (*beside, *tokenizer_json.SETTINGS):
        if (source.parent / name).is_file():
            shutil.copyfile(source.parent / name, folder / name)


def trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """Truncates `tokens` to `length`, keeping the last token, which is the end of sequence."""
    return tokens if len(tokens) <= length else np.append(tokens[: length - 1], tokens[-1])

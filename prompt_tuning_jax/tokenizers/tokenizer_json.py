"""Reads tokenizers with the `tokenizers` library: `tokenizer.json`, or RoBERTa's `vocab.json` and `merges.txt`.

These are the byte-level BPE of CodeT5 and CodeT5+, Llama's tokenizer in Pile-T5, and those of T5, mT5 and umT5 if there
is no SentencePiece file beside the model. Ids are equal to those of `transformers.AutoTokenizer`. The files beside the
tokenizer (`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`) say which tokens are special and
which ids begin a text. Their `add_bos_token` and `add_eos_token` are ignored, because a `tokenizer.json` has its own
template, which transformers prefers.

This differs from transformers on purpose in two ways. Transformers rebuilds T5's tokenizer from the vocabulary in
`tokenizer.json`; here the file is used unchanged, which gives the same ids for files that transformers wrote. And if
`clean_up_tokenization_spaces` is set, transformers drops spaces before punctuation when it decodes; here they are kept,
as in T5X and SeqIO.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from prompt_tuning_jax.errors import Setting, SettingError

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
ADDED = "added_tokens.json"  # maps tokens that are not in vocab.json to ids
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")
ROBERTA = dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))
BYTE_LEVEL = ("Roberta", "Bart")  # transformers' classes that read `vocab.json` and `merges.txt` in the same way


class TokenizerFile:
    """A tokenizer with the methods that `Vocabulary` needs.

    Attributes:
      files: the files that the tokenizer was read from.
      size: one more than the highest id.
      prefix: the ids that transformers puts in front of every text, such as CodeT5's <s>; empty for T5.
      eos_id: the id of the end of sequence, which `encode` does not append.
      unk_id: the id of the unknown token, or None if the tokenizer can encode every text.
      sentinel_ids: the ids of <extra_id_0>, <extra_id_1> and so on, in any position; empty if the tokenizer has none.
      special_ids: the ids of special tokens that are not sentinels; `decode` leaves them out.
    """

    def __init__(self, path: str):
        folder, content = Path(path).parent, _read_object(Path(path))
        self.files = [Path(path)]
        settings = self._read_settings(folder, SETTINGS[0])
        if "added_tokens_decoder" not in settings:  # files without this field are older, and need the older SETTINGS[1]
            settings |= self._read_settings(folder, SETTINGS[1])
        if isinstance(content.get("model"), dict):
            self._tokenizer = _built(path, lambda: Tokenizer.from_file(path))
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._add_tokens(path, settings)
        elif (folder / MERGES).is_file():
            self.files.append(folder / MERGES)
            settings = ROBERTA | settings
            numbers = {number: text for text, number in self._read_beside(folder, ADDED).items()}
            settings = _checked(folder / ADDED, {"added_tokens_decoder": numbers}) | settings
            self._tokenizer = _byte_level_bpe(path, settings)
            self._add_tokens(path, settings)
            first, last = (_text(settings[role]) for role in ("cls_token", "sep_token"))
            number = self._tokenizer.token_to_id
            self._tokenizer.post_processor = processors.RobertaProcessing((last, number(last)), (first, number(first)))
        else:
            raise SettingError(
                f"{path} is neither a {TOKENIZER} nor a {VOCAB} with {MERGES} beside it: set ", Setting("vocabulary")
            )
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(ids.values(), default=-1) + 1
        self.sentinel_ids = sentinels_in(ids.get)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {number for number, token in added.items() if token.special} - {*self.sentinel_ids}
        self.prefix, after = self._template()
        self.unk_id = ids.get(_text(settings.get("unk_token") or _unknown(content)))
        if settings.get("eos_token"):
            eos = ids.get(_text(settings["eos_token"]))
        else:
            eos = after[-1] if after else ids.get("</s>")
        if eos is None:
            raise SettingError(
                f"{path} does not say which token ends a sequence: write its eos_token into {SETTINGS[0]} beside it, "
                "or set ",
                Setting("vocabulary"),
            )
        self.eos_id: int = eos

    def _read_beside(self, folder: Path, name: str) -> dict[str, Any]:
        if not (file := folder / name).is_file():
            return {}
        self.files.append(file)
        return _read_object(file)

    def _read_settings(self, folder: Path, name: str) -> dict[str, Any]:
        """Returns the fields of a settings file that are not null, after checking them."""
        found = {field: value for field, value in self._read_beside(folder, name).items() if value is not None}
        return _checked(folder / name, found)

    def _add_tokens(self, path: str, settings: dict[str, Any]) -> None:
        """Adds the tokens named in the files beside the tokenizer, in the same order as transformers."""
        named = [settings[role] for role in ROLES if settings.get(role)]
        special = {_text(token): token for token in [*named, *_extra(settings)]}
        numbered = {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token in [*(numbered[number] for number in sorted(numbered)), *special.values()]:
            if (text := _text(token)) not in known:
                known.add(text)
                added = _added_token(token, text in special)
                (self._tokenizer.add_special_tokens if added.special else self._tokenizer.add_tokens)([added])
        for number, token in numbered.items():
            if (found := self._tokenizer.token_to_id(_text(token))) != number:
                raise SettingError(
                    f"{path} gives {_text(token)!r} the id {found}, and the files beside it {number}: set ",
                    Setting("vocabulary"),
                    " to a tokenizer whose files belong together",
                )

    def _template(self) -> tuple[list[int], list[int]]:
        """Returns the ids that the tokenizer puts before and after a text."""
        encoded = self._tokenizer.encode("a")
        mask = encoded.special_tokens_mask
        body = [index for index, special in enumerate(mask) if not special] or [0]
        return encoded.ids[: body[0]], encoded.ids[body[-1] + 1 :]

    def encode(self, text: str) -> list[int]:
        return self.prefix + self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self.prefix + row.ids for row in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` like transformers' `skip_special_tokens=True`, except that sentinels are kept."""
        kept = [token for token in ids if token not in self.special_ids]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def id_to_piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or "<unk>"


def sentinels_in(id_of: Callable[[str], int | None]) -> tuple[int, ...]:
    """Returns the ids of <extra_id_0>, <extra_id_1> and so on. `id_of` returns the id of a token, or None."""
    found: list[int] = []
    while True:
        names = (f"<extra_id_{len(found)}>", f"▁<extra_id_{len(found)}>")
        numbers = [number for name in names if (number := id_of(name)) is not None]
        if not numbers:
            return tuple(found)
        found.append(numbers[0])


def is_vocabulary(path: Path) -> bool:
    """Returns whether a JSON file is a `vocab.json`, which maps tokens to ids, and not a `tokenizer.json`."""
    return not isinstance(_read_object(path).get("model"), dict)


def declared_sentinels(folder: Path) -> int | None:
    """Returns the number of sentinels according to `tokenizer_config.json`, or None if it does not say."""
    if not (file := folder / SETTINGS[0]).is_file():
        return None
    settings = _checked(file, {name: value for name, value in _read_object(file).items() if value is not None})
    numbered = settings.get("added_tokens_decoder", {})
    tokens = [*_extra(settings), *numbered.values()]
    if listed := len({text for token in tokens if (text := _text(token)).startswith("<extra_id_")}):
        return listed
    count = settings.get("extra_ids")
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _unknown(content: dict[str, Any]) -> Any:
    """Returns the unknown token that the model of a `tokenizer.json` names, or None."""
    model = content.get("model", {})
    if isinstance(number := model.get("unk_id"), int) and isinstance(model.get("vocab"), list):
        return model["vocab"][number][0]  # Unigram's vocabulary is a list of [token, score]
    return model.get("unk_token")


def _added_token(token: Any, special: bool) -> AddedToken:
    """Returns the `AddedToken` of a token that is given as a text, or as an object with flags."""
    fields = token if isinstance(token, dict) else {}
    flags = {name: bool(fields.get(name)) for name in ("single_word", "lstrip", "rstrip")}
    special = special or bool(fields.get("special"))
    return AddedToken(_text(token), normalized=bool(fields.get("normalized", not special)), special=special, **flags)


def _extra(settings: dict[str, Any]) -> list[Any]:
    """Returns the special tokens that have no role. Transformers 4 and 5 have different names for their field."""
    return next((_several(settings[name]) for name in EXTRA if settings.get(name)), [])


def _byte_level_bpe(path: str, settings: dict[str, Any]) -> Tokenizer:
    """Builds RoBERTa's tokenizer from a `vocab.json` and the `merges.txt` beside it, without special tokens."""
    name = settings.get("tokenizer_class") or BYTE_LEVEL[0]
    if not str(name).startswith(BYTE_LEVEL):
        raise SettingError(
            f"{path} is the vocabulary of a {name}, expected a RobertaTokenizer: set ",
            Setting("vocabulary"),
            f" to its {TOKENIZER}, which transformers writes",
        )
    merges = str(Path(path).parent / MERGES)
    tokenizer = Tokenizer(_built(path, lambda: models.BPE.from_file(path, merges)))
    blank = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _checked(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns `settings` after checking that its tokens have the form that transformers writes.

    Raises:
      SettingError: a token has another form; the message names the field.
    """
    numbered = settings.get("added_tokens_decoder", {})
    wrong = [role for role in ROLES if role in settings and not _is_token(settings[role])]
    wrong += [name for name in EXTRA if not all(map(_is_token, _several(settings.get(name, []))))]
    if not isinstance(numbered, dict) or not all(str(n).isdecimal() and _is_token(t) for n, t in numbered.items()):
        wrong.append("added_tokens_decoder")
    if wrong:
        raise SettingError(
            f"{file} has tokens that are no texts with flags ({', '.join(wrong)}): set ",
            Setting("vocabulary"),
            " to a whole tokenizer",
        )
    return settings


def _is_token(token: Any) -> bool:
    text = token.get("content") if isinstance(token, dict) else token
    return isinstance(text, str) and text != ""


def _several(tokens: Any) -> list[Any]:
    """Returns the tokens in a list, or the values of an object; anything else becomes one invalid token."""
    if isinstance(tokens, list):
        return tokens
    return [*tokens.values()] if isinstance(tokens, dict) else [None]


def _built(path: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # the library raises no narrower type
        reason = " ".join(str(error).split())
        raise SettingError(f"{path} cannot be read as a tokenizer ({reason}): set ", Setting("vocabulary")) from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SettingError(f"{path} is not a JSON object: set ", Setting("vocabulary"), " to a whole tokenizer")
    return found


def _text(token: Any) -> str:
    """Returns the text of a token that is given as a text, or as an object with flags."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)

"""Checks and tokenises users' rows."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from reprlib import repr as shown  # truncates a user's values, so that an error stays one line
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Int as Ids

from prompt_tuning_jax.errors import near_misses
from prompt_tuning_jax.inference.labels import LabelTables, label_table
from prompt_tuning_jax.settings import (
    Float,
    Int,
    Natural,
    Number,
    OneOf,
    Seed,
    Str,
    Texts,
    annotations_of,
    check_fields,
    fault_of,
    integer,
)
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary, trim

METHODS = ("greedy", "beam", "sample")
RANK = "rank"
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "seed": int}  # fields that only `sample` reads
MAX_LABELS, MAX_LABEL_TOKENS, MAX_LABEL_CHARACTERS = 256, 128, 2_048
LABEL_BYTES = 32 * 2**20  # size of the cache of tokenised label sets
CHARACTERS = 64  # per token of `input_length`; the text after them is not tokenised
SMALLEST = 1.18e-38  # just above float32's smallest normal number: below it XLA computes with 0
FIELDS = ("prompt", "inputs", "labels", "decode", *SAMPLING)
OWN_FIELDS = ("id", "note", "targets")  # the user's own, which are returned unchanged
ANSWER = ("prediction", "score", "scores", "probabilities", "cut", "error")  # fields of an earlier answer, replaced
# Settings of the whole command, which a row cannot change.
FIXED = ("base", "dtype", "input_length", "max_new_tokens", "batch_size", "beams")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Says how answers are found for rows that do not say so themselves.

    Attributes:
      decode: "greedy"; "beam", with T5X's length penalty; or "sample".
      beams: the number of beams of "beam".
      temperature: divides the logits of "sample"; 0 is greedy.
      top_k: "sample" draws from the `top_k` most likely tokens; 0 for all tokens.
      top_p: "sample" draws from the fewest most likely tokens whose probabilities add up to `top_p` (nucleus sampling);
        1 for all tokens.
      seed: the seed of the first row; row n has `seed` + n.
      labels: if given, these labels are ranked and nothing is generated.
    """

    decode: Annotated[Str, OneOf(METHODS)] = "greedy"
    beams: Annotated[Int, integer(1, 64)] = 4
    temperature: Annotated[Float, Number(least=0, most=100)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[Float, Number(least=SMALLEST, most=1)] = 1.0
    seed: Seed = 0
    labels: Texts | None = None


class Request(NamedTuple):
    """Holds a row that has been checked and tokenised.

    Attributes:
      prompt: the prompt's name; None for the base model alone.
      inputs: token ids, int32, end of sequence included.
      truncated: whether the text was longer than `inputs`.
      method: a member of `METHODS`, or `RANK`.
      labels: the labels to rank; empty if an answer is generated.
      choices: the labels' token ids, int32 [C, L], with end of sequence and padding; None if an answer is generated.
    """

    prompt: str | None
    inputs: Ids[np.ndarray, " T"]
    truncated: bool
    method: str
    labels: tuple[str, ...]
    choices: Ids[np.ndarray, "C L"] | None
    temperature: float
    top_k: int
    top_p: float
    seed: int


class Reader:
    """Converts rows to requests with one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, input_length: int, decoding: Decoding, prompt: str | None = None):
        """Checks the defaults in the same way as rows.

        Args:
          input_length: the largest number of input tokens, end of sequence included; longer inputs are truncated.
          decoding: the settings for rows that do not give their own.
          prompt: the prompt's name for rows that have no "prompt"; None if rows must have one.
        """
        self._vocabulary, self._input_length, self._prompt = vocabulary, input_length, prompt
        self._choices = LabelTables(lambda labels: _choices(labels, vocabulary), LABEL_BYTES)
        self._decoding = decoding
        check_fields(decoding)
        if decoding.labels is not None:
            self.request({"inputs": "a", "prompt": None, "labels": decoding.labels})

    def request(self, row: Any, number: int = 0) -> Request:
        """Returns the request for a row.

        Args:
          row: a mapping with "prompt", a name or None for the base model alone, and "inputs", a text. Optional fields:
            "labels", which are ranked; or "decode" and, for "sample", "temperature", "top_k", "top_p" and "seed".
            `OWN_FIELDS` and the fields of an earlier answer (`ANSWER`) may have any value.
          number: the row's index, which is added to the default seed.

        Raises:
          ValueError: the row is invalid; the message names the field.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f'found {shown(row)}, expected an object: {{"prompt": ..., "inputs": ...}}')
        _refuse_unknown_fields(row)
        prompt = row.get("prompt", self._prompt)
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt is {shown(prompt)}, expected the name of a prompt, or null for the base alone")
        if prompt is None and "prompt" not in row:
            raise ValueError('the row has no "prompt": name one, or null for the base alone')
        inputs, truncated = self._inputs(row)
        sampled = [name for name in SAMPLING if name in row]
        labels = self._labels(row)
        if labels is not None:
            _refuse_without_effect(
                ["decode", *sampled],
                row,
                "in a row with labels, which are ranked and not generated",
                "or leave out labels",
            )
            return Request(prompt, inputs, truncated, RANK, labels, self._choices(labels), 0.0, 0, 1.0, 0)
        _check_values(row)
        method = row.get("decode", self._decoding.decode)
        if method != "sample":
            _refuse_without_effect(sampled, row, f'with decode "{method}"', "or set decode to sample")
        values = dataclasses.asdict(self._decoding) | {name: row[name] for name in sampled}
        if "seed" not in row:
            values["seed"] = (int(values["seed"]) + number) % 2**32
        temperature, top_k, top_p, seed = (kind(values[name]) for name, kind in SAMPLING.items())
        return Request(prompt, inputs, truncated, method, (), None, temperature, top_k, top_p, seed)

    def _inputs(self, row: Mapping[str, Any]) -> tuple[Ids[np.ndarray, " T"], bool]:
        if "inputs" not in row:
            raise ValueError('the row has no "inputs", expected a text')
        text = row["inputs"]
        if not isinstance(text, str):
            raise ValueError(f"inputs is {shown(text)}, expected a text")
        if not text.strip():
            raise ValueError("inputs is empty, expected a text")
        begin = _truncate_text(text, CHARACTERS * self._input_length)
        ids = np.array(
            [*self._vocabulary.encode(_check_characters(begin, "inputs")), self._vocabulary.eos_id], np.int32
        )
        return trim(ids, self._input_length), len(begin) < len(text) or len(ids) > self._input_length

    def _labels(self, row: Mapping[str, Any]) -> tuple[str, ...] | None:
        if "labels" not in row:
            default = None if "decode" in row else self._decoding.labels
            return None if default is None else tuple(default)
        labels = row["labels"]
        if fault := fault_of(labels, Texts):
            raise ValueError(f"labels{fault}")
        if not 1 <= len(labels) <= MAX_LABELS:
            raise ValueError(f"there are {len(labels)} labels, expected 1 to {MAX_LABELS}")
        return tuple(_check_characters(label, "labels") for label in labels)


def _choices(labels: Sequence[str], vocabulary: Vocabulary) -> Ids[np.ndarray, "C L"]:
    """Returns the label table; raises ValueError if a label is empty or too long, or if two have the same tokens."""
    for label in labels:
        if len(label) > MAX_LABEL_CHARACTERS:
            raise ValueError(
                f"label {shown(label)} has {len(label):,} characters, expected at most {MAX_LABEL_CHARACTERS:,}"
            )
        tokens = len(vocabulary.subwords(label))
        if not 1 <= tokens < MAX_LABEL_TOKENS:
            raise ValueError(f"label {shown(label)} has {tokens} tokens, expected 1 to {MAX_LABEL_TOKENS - 1}")
    table = label_table(labels, vocabulary)
    first: dict[bytes, int] = {}
    for index, ids in enumerate(table):
        if (same := first.setdefault(ids.tobytes(), index)) != index:
            alike = f"{shown(labels[same])} and {shown(labels[index])}"
            raise ValueError(f"the labels {alike} are the same tokens: expected others")
    return table


def _check_values(row: Mapping[str, Any]) -> None:
    """Raises ValueError if a field of a row has a value that the field of the same name of `Decoding` cannot have."""
    for name, annotation in annotations_of(Decoding).items():
        if name in row and (fault := fault_of(row[name], annotation)):
            raise ValueError(f"{name}{fault}")


def _refuse_without_effect(fields: Sequence[str], row: Mapping[str, Any], where: str, otherwise: str) -> None:
    unused = [name for name in fields if name in row]
    if unused:
        verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        raise ValueError(f"{' and '.join(unused)} {verb} no effect {where}: leave {them} out, {otherwise}")


def _refuse_unknown_fields(row: Mapping[str, Any]) -> None:
    for name in row:
        if name in FIELDS or name in OWN_FIELDS or name in ANSWER:
            continue
        if name in FIXED:
            raise ValueError(f"{name} cannot be set per row, only when the command is started: leave it out of the row")
        short = str(name)[:40]
        hint = near_misses(short, FIELDS, few=len(FIELDS))
        own = f"a field of your own may be called {' or '.join(OWN_FIELDS)}"
        raise ValueError(f"{shown(short)} is no field of a row; {hint} ({own})")


def _truncate_text(text: str, characters: int) -> str:
    """Returns the beginning of a text that is tokenised: whole words, at most `characters` characters in total."""
    if len(text) > characters and not text[:characters].strip():
        text = text.lstrip()
    if len(text) <= characters:
        return text
    begin = text[:characters]
    words = begin.rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else begin


def read_json(text: str) -> Any:
    """Reads strict JSON: Python would also accept NaN and 1e999, which cannot be written as JSON again.

    Raises:
      ValueError: `text` is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _check_characters(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field} has half a surrogate pair (\\ud800 to \\udfff), expected whole characters") from None
    return text

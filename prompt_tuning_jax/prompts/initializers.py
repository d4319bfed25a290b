"""How a prompt starts (section 2.1): random, sampled vocabulary, class labels, a text, or a file.

Each is a frozen dataclass that is called with `(key, length, model)` and returns a prompt, float32 [P, D]. `model` is
the frozen base model, of which it may read `config`, `embeddings` [V, D] and `tokenizer`. A function of these three
arguments is an initialiser, too.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(config=SimpleNamespace(emb_dim=4))
    >>> RandomUniform()(jax.random.key(0), 3, model).shape
    (3, 4)
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.prompts.files import read_prompt

SPECIAL_TOKENS = 3  # T5's <pad>, </s> and <unk> are ids 0, 1 and 2
UNKNOWN = 2

Encode = Callable[[str], Sequence[int]]
Initializer = Callable[..., jax.Array]  # (key, length, model) -> [P, D]


@dataclasses.dataclass(frozen=True)
class RandomUniform:
    """Uniform over [minval, maxval): the paper's random initialisation is over [-0.5, 0.5)."""

    minval: float = -0.5
    maxval: float = 0.5

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        return jax.random.uniform(key, (length, model.config.emb_dim), jnp.float32, self.minval, self.maxval)


@dataclasses.dataclass(frozen=True)
class OfficialRandomUniform(RandomUniform):
    """Uniform over [0, 0.5): what the official runs used, since Flax's `uniform(scale)` starts at 0."""

    minval: float = 0.0


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
    """Embeddings of distinct tokens, drawn from the `population` first ids: the most common ones, no special ones.

    Sentinels and padding rows of the table are never drawn, however large the population. Tokens are drawn with
    replacement only if the prompt is longer than the population. The official code also draws <pad>, </s> and <unk>.
    """

    population: int = 5_000

    def __post_init__(self):
        if self.population <= SPECIAL_TOKENS:
            raise ValueError(f"population is {self.population}, expected more than the {SPECIAL_TOKENS} special tokens")

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        table = jnp.asarray(model.embeddings)
        words = word_ids(model.tokenizer, table.shape[0])
        ids = jnp.arange(words.start, min(self.population, words.stop))
        drawn = jax.random.choice(key, ids, (length,), replace=length > len(ids))
        return table[drawn].astype(jnp.float32)


def word_ids(tokenizer: Any, rows: int) -> range:
    """Returns the ids that are no special tokens, sentinels or padding rows of the embedding table.

    Args:
      tokenizer: one with `size` and `sentinels`, as `tasks.vocabularies.Vocabulary`, or with `vocab_size` and
        `extra_ids`, as SeqIO's. For any other, no row of the table is known to be a sentinel or padding.
      rows: of the embedding table.
    """
    size = getattr(tokenizer, "size", getattr(tokenizer, "vocab_size", rows))
    sentinels = getattr(tokenizer, "sentinels", getattr(tokenizer, "extra_ids", 0))  # the last ids below `size`
    return range(SPECIAL_TOKENS, min(rows, size - sentinels))


SAMPLED_VOCABULARY = SampledVocabulary()  # the default of every method that starts from a prompt


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """Position i is label i, the mean over its subwords' embeddings; sampled vocabulary fills the other positions.

    Called raises SettingError if a label is empty or has a subword that the tokenizer does not know.
    """

    labels: Sequence[str]
    population: int = 5_000

    def __post_init__(self):
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise SettingError(Setting("class_labels"), f" is {self.labels!r}, expected a list of texts")
        if not self.labels:
            raise SettingError(
                Setting("class_labels"), " is empty: set it to the task's labels, or take another initialisation"
            )
        object.__setattr__(self, "labels", tuple(self.labels))

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        rows = [jnp.mean(_embed(label, model, "class_labels"), axis=0) for label in self.labels]
        return _overwrite(SampledVocabulary(self.population)(key, length, model), rows, "class labels")


@dataclasses.dataclass(frozen=True)
class Text:
    """Position j is the embedding of subword j of `text`; sampled vocabulary fills the other positions."""

    text: str
    population: int = 5_000

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        rows = list(_embed(self.text, model, "prompt_text"))
        return _overwrite(SampledVocabulary(self.population)(key, length, model), rows, "subwords")


@dataclasses.dataclass(frozen=True)
class FromFile:
    """The prompt in a file of any format that `prompts.files.read_prompt` knows, of the shape asked for."""

    path: str

    def __call__(self, key: jax.Array, length: int, model: Any) -> Float[Array, "P D"]:
        del key
        prompt, width = read_prompt(self.path), model.config.emb_dim
        if prompt.shape != (length, width):
            raise SettingError(
                f"prompt {self.path} is [{prompt.shape[0]}, {prompt.shape[1]}], expected [{length}, {width}]: set ",
                Setting("prompt_length"),
                " to its length, and ",
                Setting("initial_checkpoint_path"),
                " to the base model it was trained on",
            )
        return jnp.asarray(prompt)


def written_prompt(text: str, model: Any) -> Float[Array, "n D"]:
    """Returns the prompt whose positions are the subwords of a text: in front of the inputs it is that text."""
    return _embed(text, model, "prompt_text")


def _embed(text: str, model: Any, setting: str) -> Float[Array, "n D"]:
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    if not len(ids) or UNKNOWN in ids:
        found = "nothing" if not len(ids) else "<unk>"
        raise SettingError(
            f"{text!r} tokenises to {found}: set ", Setting(setting), " to words that the tokenizer knows"
        )
    return jnp.asarray(model.embeddings)[ids].astype(jnp.float32)


def _overwrite(prompt: Float[Array, "P D"], rows: list[jax.Array], what: str) -> Float[Array, "P D"]:
    if len(rows) > prompt.shape[0]:
        logging.warning("%d %s, but the prompt has %d positions: the rest is left out", len(rows), what, len(prompt))
    rows = rows[: prompt.shape[0]]
    return prompt.at[: len(rows)].set(jnp.stack(rows))

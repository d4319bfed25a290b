"""How a prompt starts (section 2.1): random, sampled vocabulary, class labels, a string, or a file.

Each is a function `(key, (P, D), *, embeddings, encode, ...) -> float32 [P, D]`, where `embeddings` [V, D] is the
frozen base's table and `encode` turns a text into its pieces' ids, with no end of sequence. What is after them is the
initialiser's own and set by gin or `functools.partial`.
"""

import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prompt_tuning_jax.prompts.files import read_prompt

SPECIAL_TOKENS = 3  # T5's <pad>, </s> and <unk> are ids 0, 1 and 2
UNKNOWN = 2

Encode = Callable[[str], Sequence[int]]


def random_uniform(
    key: jax.Array, shape: tuple[int, int], *, minval: float = -0.5, maxval: float = 0.5, **_
) -> Float[Array, "P D"]:
    """Uniform over [minval, maxval): the paper's random initialisation."""
    return jax.random.uniform(key, shape, jnp.float32, minval, maxval)


def official_random_uniform(key: jax.Array, shape: tuple[int, int], **_) -> Float[Array, "P D"]:
    """Uniform over [0, 0.5): what the official runs used, since Flax's `uniform(scale)` starts at 0."""
    return random_uniform(key, shape, minval=0.0, maxval=0.5)


def sampled_vocabulary(
    key: jax.Array, shape: tuple[int, int], *, embeddings: Float[Array, "V D"], population: int = 5_000, **_
) -> Float[Array, "P D"]:
    """Embeddings of distinct tokens, drawn from the `population` first ids: the most common ones, specials left out.

    Drawn with replacement only where P exceeds the population. The official code leaves <pad>, </s> and <unk> in.
    """
    if population <= SPECIAL_TOKENS:
        raise ValueError(f"population is {population}, expected more than the {SPECIAL_TOKENS} special tokens")
    ids = jnp.arange(SPECIAL_TOKENS, min(population, embeddings.shape[0]))
    drawn = jax.random.choice(key, ids, (shape[0],), replace=shape[0] > len(ids))
    return jnp.asarray(embeddings)[drawn].astype(jnp.float32)


def class_labels(
    key: jax.Array,
    shape: tuple[int, int],
    *,
    embeddings: Float[Array, "V D"],
    encode: Encode,
    labels: Sequence[str],
    population: int = 5_000,
    **_,
) -> Float[Array, "P D"]:
    """Position i is label i, the mean over its pieces; the positions left are sampled vocabulary.

    Raises:
      ValueError: there is no label, or one is empty or has a piece that the vocabulary does not know.
    """
    if not labels:
        raise ValueError("CLASS_LABELS is empty: set it to the task's labels, or take another initialisation")
    rows = [jnp.mean(_embed(label, embeddings, encode, "CLASS_LABELS"), axis=0) for label in labels]
    return _overwrite(
        sampled_vocabulary(key, shape, embeddings=embeddings, population=population), rows, "class labels"
    )


def string(
    key: jax.Array,
    shape: tuple[int, int],
    *,
    embeddings: Float[Array, "V D"],
    encode: Encode,
    text: str,
    population: int = 5_000,
    **_,
) -> Float[Array, "P D"]:
    """Position j is piece j of `text`; the positions left are sampled vocabulary."""
    rows = list(_embed(text, embeddings, encode, "PROMPT_TEXT"))
    return _overwrite(sampled_vocabulary(key, shape, embeddings=embeddings, population=population), rows, "pieces")


def from_file(key: jax.Array, shape: tuple[int, int], *, path: str, **_) -> Float[Array, "P D"]:
    """The prompt in a file, which must have the shape asked for."""
    del key
    prompt = read_prompt(path)
    if prompt.shape != tuple(shape):
        raise ValueError(
            f"prompt {path} is [{prompt.shape[0]}, {prompt.shape[1]}], expected [{shape[0]}, {shape[1]}]: "
            "set PROMPT_LENGTH to its length, and INITIAL_CHECKPOINT_PATH to the base it was trained on"
        )
    return jnp.asarray(prompt)


def _embed(text: str, embeddings: Float[Array, "V D"], encode: Encode, macro: str) -> Float[Array, "n D"]:
    ids = np.asarray(encode(text), np.int32)
    if not len(ids) or UNKNOWN in ids:
        found = "nothing" if not len(ids) else "<unk>"
        raise ValueError(f"{text!r} tokenises to {found}: set {macro} to words that the vocabulary can write")
    return jnp.asarray(embeddings)[ids].astype(jnp.float32)


def _overwrite(prompt: Float[Array, "P D"], rows: list[jax.Array], what: str) -> Float[Array, "P D"]:
    if len(rows) > prompt.shape[0]:
        logging.warning("%d %s, but the prompt has %d positions: the rest is left out", len(rows), what, len(prompt))
    rows = rows[: prompt.shape[0]]
    return prompt.at[: len(rows)].set(jnp.stack(rows))

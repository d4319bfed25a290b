"""Initialises the prompt under T5X, which gives an initialiser a key and a shape; ours also need the base model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prompt_tuning_jax.checkpoints.base import open_model
from prompt_tuning_jax.methods.method import start_key
from prompt_tuning_jax.prompts.initializers import start_prompt
from prompt_tuning_jax.t5x_host.macros import named_by_macros

EMBEDDINGS = "token_embedder/embedding"


@named_by_macros()
def read_embeddings(path: str) -> Float[Array, "V D"]:
    """Reads the embedding table of the base model at `path`, INITIAL_CHECKPOINT_PATH, and no other array.

    Raises:
      ValueError: there is no base model, or it has no such table.
    """
    arrays = open_model(path).arrays
    if EMBEDDINGS not in arrays:
        raise ValueError(f"{path} has no {EMBEDDINGS}, expected a T5 checkpoint: set INITIAL_CHECKPOINT_PATH")
    return jnp.asarray(np.asarray(arrays[EMBEDDINGS]))


@named_by_macros()
def prompt_init(
    key: jax.Array,
    shape: tuple[int, int],
    *,
    init: Callable[..., jax.Array],
    initial_checkpoint_path: str,
    vocabulary: Any,
    seed: int | None,
) -> Float[Array, "P D"]:
    """Returns the initial prompt; use it as `SoftPrompt.prompt_init` with any initialiser of `prompts.initializers`.

    Args:
      key: T5X's key, which is used only if `seed` is None.
      shape: (P, D).
      init: an initialiser, see `prompts.initializers.start_prompt`.
      initial_checkpoint_path: path of the base model.
      vocabulary: the model's vocabulary, SeqIO's or any object with `encode`.
      seed: RANDOM_SEED. With the same seed, `prompt_tuning_jax.train` starts from the same prompt.
    """
    # T5X initialises in a jitted function, of which the whole table would become a constant if it were computed there.
    with jax.ensure_compile_time_eval():
        if seed is not None:
            key = start_key(seed)
        embeddings = read_embeddings(initial_checkpoint_path)
        width = SimpleNamespace(emb_dim=embeddings.shape[1])
        return start_prompt(
            init, key, shape[0], SimpleNamespace(config=width, embeddings=embeddings, tokenizer=vocabulary)
        )

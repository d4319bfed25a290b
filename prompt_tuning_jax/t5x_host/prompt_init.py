"""The prompt before its first update: T5X gives an initialiser a key and a shape, ours want the base, too."""

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
    """The table of the base at `path`, INITIAL_CHECKPOINT_PATH; no other array is read.

    Raises:
      ValueError: no base is there, or it has no such table.
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
    """`SoftPrompt.prompt_init` for any of `prompts.initializers`.

    Args:
      key: T5X's, used only where `seed` is None.
      init: an initialiser, see `prompts.initializers.start_prompt`.
      initial_checkpoint_path: of the base.
      vocabulary: the model's, SeqIO's or any with `encode`.
      seed: RANDOM_SEED; the prompt is then the one that `prompt_tuning_jax.train` starts from with the same seed.
    """
    # T5X initialises inside a compiled function: computed there, the whole table would be a constant of the program.
    with jax.ensure_compile_time_eval():
        if seed is not None:
            key = start_key(seed)
        embeddings = read_embeddings(initial_checkpoint_path)
        width = SimpleNamespace(emb_dim=embeddings.shape[1])
        return start_prompt(
            init, key, shape[0], SimpleNamespace(config=width, embeddings=embeddings, tokenizer=vocabulary)
        )

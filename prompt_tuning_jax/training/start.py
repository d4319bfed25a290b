"""What a run starts from: the prompt before its first update."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.tasks.vocabularies import Vocabulary

MAX_ENCODER_LENGTH = 4_096  # no position table limits a T5, but attention's memory grows with the square


def check_prompt_length(prompt_init: Callable | None, prompt_length: int, dataset: DatasetConfig) -> None:
    """Raises ValueError where the prompt has no position, or leaves no room for the inputs."""
    if prompt_init is None:
        return
    room = MAX_ENCODER_LENGTH - dataset.task_feature_lengths.get("inputs", 0)
    if not isinstance(prompt_length, int) or not 1 <= prompt_length <= room:
        raise ValueError(f"PROMPT_LENGTH is {prompt_length!r}, expected 1 to {room} beside inputs of this length")


def start_prompt(
    init: Callable[..., jax.Array], length: int, embeddings: Float[Array, "V D"], vocabulary: Vocabulary, seed: int
) -> Float[Array, "P D"]:
    """The prompt that training starts from: a function of the seed, the base's embedding table and the vocabulary."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return init(key, (length, embeddings.shape[1]), embeddings=embeddings, encode=vocabulary.encode)

"""Which words a prompt's positions lie near (section 7): cosine nearest neighbours in the frozen vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Neighbors(NamedTuple):
    """For each prompt position its nearest ids, the nearest first, and their cosines."""

    ids: Int[Array, "P k"]
    cosines: Float[Array, "P k"]


def nearest(prompt: Float[Array, "P D"], embeddings: Float[Array, "V D"], k: int = 5) -> Neighbors:
    """The `k` rows of `embeddings` with the largest cosine to each position; ids 0 to 2 are no words, and left out."""
    unit = [x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (prompt, embeddings)]
    cosines = (unit[0] @ unit[1].T).at[:, :3].set(-jnp.inf)
    values, ids = jax.lax.top_k(cosines, k)
    return Neighbors(ids, values)

"""Computes the cross-entropy as T5X does: summed over the target tokens, with a z-loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
    """Holds sums over the target tokens of a batch, all float32.

    Attributes:
      loss: cross-entropy plus z-loss, in nats. Training minimises it.
      z_loss: the z-loss alone, which keeps the softmax normaliser near 1.
      tokens: the number of target tokens, end of sequence included.
      correct: the number of target tokens that have the largest logit.
      rows: the number of rows with a target token. Rows of padding have no example.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]
    rows: Float[Array, ""]


def cross_entropy(
    logits: Float[Array, "B U V"], targets: Int[Array, "B U"], pad: int, z_loss: float = 1e-4
) -> LossSums:
    """Returns the loss of a batch (T5X losses.py, `LOSS_NORMALIZING_FACTOR=None`, label smoothing 0).

    Args:
      logits: float32.
      targets: token ids. Those that equal `pad` are ignored.
      pad: the model's padding id.
      z_loss: coefficient of the z-loss, the squared logarithm of the softmax normaliser.
    """
    weights = (targets != pad).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    extra = jnp.sum(z_loss * jnp.square(normaliser) * weights)
    loss = jnp.sum((normaliser - picked) * weights) + extra
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights)
    return LossSums(loss, extra, jnp.sum(weights), correct, jnp.sum(jnp.max(weights, axis=-1)))

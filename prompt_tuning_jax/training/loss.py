"""Cross-entropy as T5X computes it: summed over target tokens, with a z-loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
    """Sums over the target tokens of a batch, float32.

    Attributes:
      loss: cross-entropy plus z-loss, in nats: what is differentiated.
      z_loss: the part of it that keeps the logits' normaliser near 1.
      tokens: target tokens, end of sequence included.
      correct: tokens whose logit is the largest.
      rows: with a target token: those of an example.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]
    rows: Float[Array, ""]


def cross_entropy(
    logits: Float[Array, "B U V"], targets: Int[Array, "B U"], pad: int, z_loss: float = 1e-4
) -> LossSums:
    """The loss of a batch (T5X losses.py, `LOSS_NORMALIZING_FACTOR=None`, label smoothing 0).

    Args:
      targets: token ids; those that are `pad` weigh nothing.
      pad: the model's padding id.
      z_loss: factor of the squared logarithm of the softmax normaliser.
    """
    weights = (targets != pad).astype(jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    extra = jnp.sum(z_loss * jnp.square(normaliser) * weights)
    loss = jnp.sum((normaliser - picked) * weights) + extra
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weights)
    return LossSums(loss, extra, jnp.sum(weights), correct, jnp.sum(jnp.max(weights, axis=-1)))

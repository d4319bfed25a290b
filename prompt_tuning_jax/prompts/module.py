"""Defines the Flax module of a prompt, a learned matrix before the encoder's input (Lester et al. 2021, section 2)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from flax.linen.partitioning import param_with_axes
from jaxtyping import Array, Float

PAPER = functools.partial(jax.random.uniform, minval=-0.5, maxval=0.5)  # the paper's random initialisation


class SoftPrompt(nn.Module):
    """Owns the prompt if it is a parameter of the model, as under T5X; does not depend on models or tasks.

    Attributes:
      length: number of prompt positions, P.
      prompt_init: called with (key, (P, D)); `t5x_host.prompt_init` adapts the initialisers of
        `prompts.initializers`.
    """

    length: int
    prompt_init: Callable[..., jax.Array] = PAPER

    @nn.compact
    def __call__(self, embedded: Float[Array, "B T D"]) -> Float[Array, "P D"]:
        """Returns the prompt [P, D] for inputs of width D; the network puts it before each row (`t5.network`)."""
        shape, axes = (self.length, embedded.shape[-1]), ("prompt", "prompt_embed")
        return param_with_axes("prompt", lambda key, *_: self.prompt_init(key, shape), shape, axes=axes)

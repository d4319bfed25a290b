"""The soft prompt: a learned matrix in front of the encoder's input (Lester et al. 2021, section 2)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.partitioning import param_with_axes
from jaxtyping import Array, Float

from prompt_tuning_jax.prompts.initializers import random_uniform


class SoftPrompt(nn.Module):
    """Owns the prompt; knows nothing of models or tasks.

    Attributes:
      length: number of prompt positions, P.
      prompt_init: called with (key, (P, D)); see `prompts.initializers`.
    """

    length: int
    prompt_init: Callable[..., jax.Array] = random_uniform

    @nn.compact
    def __call__(
        self, embedded: Float[Array, "B T D"], prompt: Float[Array, "P D"] | Float[Array, "B P D"] | None = None
    ) -> Float[Array, "B S D"]:
        """Puts `prompt`, or the module's own where it is None, before each row of `embedded`."""
        if prompt is None:
            shape, axes = (self.length, embedded.shape[-1]), ("prompt", "prompt_embed")
            prompt = param_with_axes("prompt", lambda key, *_: self.prompt_init(key, shape), shape, axes=axes)
        return prepend_prompt(embedded, prompt)


def prepend_prompt(
    embedded: Float[Array, "B T D"], prompt: Float[Array, "P D"] | Float[Array, "B P D"]
) -> Float[Array, "B P+T D"]:
    """Puts `prompt` before each row of `embedded`; a [B, P, D] prompt gives each row its own (figure 2)."""
    # One a row, and then narrowed: the rows' gradients are summed in the prompt's own float32.
    prompt = jnp.broadcast_to(prompt, (embedded.shape[0], *prompt.shape[-2:])).astype(embedded.dtype)
    return jnp.concatenate([prompt, embedded], axis=1)

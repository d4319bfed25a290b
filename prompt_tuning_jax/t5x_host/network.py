"""Adds a soft prompt to T5X's own network (t5x/examples/t5/network.py) by a subclass."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from t5x.examples.t5 import layers, network  # pyright: ignore[reportMissingImports]

from prompt_tuning_jax.t5.network import prepend_prompt


class Transformer(network.Transformer):
    """T5X's minimal T5 with a prompt, the parameter `encoder/prompt/prompt`; other parameters keep their names.

    T5X gets tokens for the prompt's positions too, and computes its masks from them. Only their embedding is replaced.

    Attributes:
      prompt_factory: builds a `prompts.module.SoftPrompt`, given Flax's `parent` and `name`.
    """

    prompt_factory: Callable[..., nn.Module]

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B T"],
        encoder_segment_ids: Int[Array, "B T"] | None = None,
        enable_dropout: bool = True,
    ) -> Float[Array, "B S D"]:
        """Returns the encoder's output for prompt and inputs, [B, P+T, D]; raises ValueError for packed examples."""
        if encoder_segment_ids is not None:
            raise ValueError("packed examples (encoder_segment_ids) cannot share one prompt: set pack=False")
        length = self.prompt_factory(parent=None).length

        def embed_after_prompt(
            embed: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            if not isinstance(context.module, layers.Embed) or context.method_name != "__call__":
                return embed(*args, **kwargs)
            embedded = embed(args[0][:, length:])
            return prepend_prompt(embedded, self.prompt_factory(parent=self.encoder, name="prompt")(embedded))

        with nn.intercept_methods(embed_after_prompt):
            return super().encode(_with_prompt(encoder_input_tokens, length), None, enable_dropout)

    def decode(
        self, encoded: Float[Array, "B S D"], encoder_input_tokens: Int[Array, "B T"], *args: Any, **kwargs: Any
    ) -> Float[Array, "B Q V"]:
        """Calls T5X's `decode`, with a mask that also shows the prompt's positions in the encoder's output."""
        length = encoded.shape[1] - encoder_input_tokens.shape[1]
        return super().decode(encoded, _with_prompt(encoder_input_tokens, length), *args, **kwargs)


def _with_prompt(tokens: Int[Array, "B T"], length: int) -> Int[Array, "B S"]:
    return jnp.pad(tokens, ((0, 0), (length, 0)), constant_values=1)

"""Per-layer prompts: one prompt for each encoder layer (google-research/prompt-tuning, extended/train/per_layer.py).

They enter each layer's input and are projected by its own frozen matrices, unlike prefix tuning's keys and values.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True, init=False)
class PerLayerPrompt(Method):
    """A prompt in front of the input, which each layer's own prompt then replaces; L P D parameters.

    Attributes:
      length: positions, P, of each layer's prompt.
      initializer: how each starts, with a key of its own; see `prompts.initializers`.
    """

    length: int
    initializer: Initializer

    def __init__(self, length: int = 20, init: Initializer = SAMPLED_VOCABULARY):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        keys = jax.random.split(key, model.config.num_encoder_layers)
        return {"layer_prompts": jnp.stack([self.initializer(own, self.length, model) for own in keys])}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(layer_prompts=trained["layer_prompts"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)

"""Per-layer prompts: one prompt for each encoder layer (google-research/prompt-tuning, extended/train/per_layer.py).

They enter each layer's input and are projected by its own frozen matrices, unlike prefix tuning's keys and values.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count, OneOf, Str
from prompt_tuning_jax.t5.config import T5Config

REPLACE, ADD = "replace", "add"
Combine = Annotated[Str, OneOf((REPLACE, ADD))]


@dataclasses.dataclass(frozen=True, init=False)
class PerLayerPrompt(Method):
    """A prompt in front of the input, and one more for each further encoder layer; L P D parameters.

    Layer l reads [p_l; x] if `combine` is "replace", and [e + p_l; x] if it is "add", where the layer before gave
    [e; x]. The first layer reads [p_0; x] either way. The official code has a prompt p in front and L more: the first
    of these replaces p, or is added to it, so that two matrices would do the work of one. Here p_0 stands for both.

    Attributes:
      length: positions, P, of each layer's prompt.
      initializer: how prompts start, with a key for each; see `prompts.initializers`. With "add" it is for p_0 alone:
        the others start at zero, so that the first step is that of prompt tuning. The official code draws them like p.
      combine: whether each prompt replaces what the layer before made of those positions, or is added to it.
    """

    length: Count
    initializer: Initializer
    combine: Combine

    def __init__(
        self,
        length: Count = 20,
        init: Initializer = SAMPLED_VOCABULARY,
        combine: Combine = REPLACE,
    ):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "initializer", init)
        object.__setattr__(self, "combine", combine)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        layers = model.config.num_encoder_layers
        if self.combine == ADD:
            first = start_prompt(self.initializer, key, self.length, model)
            return {"layer_prompts": jnp.zeros((layers, *first.shape), first.dtype).at[0].set(first)}
        keys = jax.random.split(key, layers)
        return {"layer_prompts": jnp.stack([start_prompt(self.initializer, own, self.length, model) for own in keys])}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        prompts = trained["layer_prompts"]
        if self.combine == ADD:
            return Injection(prompt=prompts[0], layer_prompts=prompts.at[0].set(0.0))
        return Injection(layer_prompts=prompts)

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)

"""Per-layer prompts: one prompt for each encoder layer (google-research/prompt-tuning, extended/train/per_layer.py).

A prompt is part of its layer's input, so the layer's frozen matrices project it. Prefix tuning trains the projected
keys and values themselves.
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
    """Trains one prompt per encoder layer: L P D parameters.

    If the previous layer returned [e; x], layer l reads [p_l; x] with `combine` "replace", and [e + p_l; x] with "add".
    The first layer reads [p_0; x] with both. The official code has a prompt p in front of the input and L more prompts,
    the first of which replaces p or is added to it: those are two matrices where one is enough. Here p_0 is both.

    Attributes:
      length: number of positions of each layer's prompt, P.
      initializer: how the prompts start, each with its own key; see `prompts.initializers`. With "add" it is only for
        p_0, and the others start at zero, so that the first step equals that of prompt tuning. The official code draws
        the others like p.
      combine: whether each prompt replaces what the previous layer returned for those positions, or is added to it.
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

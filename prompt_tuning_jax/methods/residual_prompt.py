"""Residual prompt tuning (Razdaibiedina et al. 2023, arXiv 2305.03937).

    P'_i = P_i + LayerNorm(W_up ReLU(W_down P_i + b_down) + b_up)

All positions share one network. Formula and settings are those of the authors' code (arazd/ResidualPrompts). After
training, P' is computed once and is the prompt: the network is no longer needed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.linear import draw_linear
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count
from prompt_tuning_jax.t5.config import T5Config

EPSILON = 1e-5  # torch's LayerNorm


@dataclasses.dataclass(frozen=True, init=False)
class ResidualPrompt(Method):
    """Trains a prompt, and a residual network that is applied to each of its positions.

    Attributes:
      length: number of prompt positions, P.
      bottleneck: width of the hidden layer, m. The authors' code uses 800; 400 gives the paper's parameter count.
      initializer: how P starts; see `prompts.initializers`.
    """

    length: Count
    bottleneck: Count
    initializer: Initializer

    def __init__(self, length: Count = 100, bottleneck: Count = 800, init: Initializer = SAMPLED_VOCABULARY):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "bottleneck", bottleneck)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_prompt, of_down, of_up = jax.random.split(key, 3)
        prompt = start_prompt(self.initializer, of_prompt, self.length, model)
        width = prompt.shape[1]
        down, down_bias = draw_linear(of_down, width, self.bottleneck)
        up, up_bias = draw_linear(of_up, self.bottleneck, width)
        return {
            "prompt": prompt,
            "down": down,
            "down_bias": down_bias,
            "up": up,
            "up_bias": up_bias,
            "norm_scale": jnp.ones(width),
            "norm_bias": jnp.zeros(width),
        }

    def apply(self, trained: Params, frozen: Params) -> Injection:
        prompt = trained["prompt"]
        hidden = jax.nn.relu(prompt @ trained["down"] + trained["down_bias"])
        residual = hidden @ trained["up"] + trained["up_bias"]
        centred = residual - jnp.mean(residual, axis=1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True) + EPSILON)
        return Injection(prompt=prompt + normed * trained["norm_scale"] + trained["norm_bias"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)

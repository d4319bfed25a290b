"""Trains a prompt with a scale and a shift per feature.

    P'_ij = P_ij s_j + b_j,    s [D] from 1,  b [D] from 0

ULPT (arXiv 2502.04501) computes P' in the same way from its projected prompt; here P itself is trained. P' can be no
more than what prompt tuning can learn, but s and b move all positions at once, which changes the optimisation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SAMPLED_VOCABULARY, Initializer, start_prompt
from prompt_tuning_jax.settings import Count
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True, init=False)
class ScaleShiftPrompt(Method):
    """Trains a prompt, and one scale and one shift per feature: P D + 2 D parameters.

    Attributes:
      length: number of prompt positions, P.
      initializer: how P starts; see `prompts.initializers`.
    """

    length: Count
    initializer: Initializer

    def __init__(self, length: Count = 100, init: Initializer = SAMPLED_VOCABULARY):
        object.__setattr__(self, "length", length)
        object.__setattr__(self, "initializer", init)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        prompt = start_prompt(self.initializer, key, self.length, model)
        width = prompt.shape[1]
        return {"prompt": prompt, "scale": jnp.ones(width, jnp.float32), "shift": jnp.zeros(width, jnp.float32)}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(prompt=trained["prompt"] * trained["scale"] + trained["shift"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        super().check(config, input_length)

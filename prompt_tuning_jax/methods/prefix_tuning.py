"""Prefix tuning: trains keys and values for every layer (Li and Liang 2021; P-tuning v2, Liu et al. 2022).

    attention(x) = softmax(Q [K_prefix; K]^T + bias) [V_prefix; V]

K_prefix and V_prefix are trained directly, without a network that computes them (P-tuning v2, and PEFT's default).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.settings import Count, Texts, accepts, check
from prompt_tuning_jax.t5.adapters import ATTENTION, PREFIX, prefix_shape
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Method):
    """Trains P keys and values per layer, 2 L P H K parameters for each stack; they start from N(0, 1) as in PEFT.

        >>> PrefixTuning(10, stacks="decoder")
        PrefixTuning(length=10, stacks=('decoder',))

    In the decoder, self-attention reads them. T5's relative positions see a prefix right in front of the first position
    of its stack, as in `transformers` with P positions in its cache.

    Attributes:
      length: number of keys per layer, P.
      stacks: "encoder", "decoder" or both. The paper uses both for a model with two stacks (section 4.2). PEFT only
        has the decoder's: such a prefix is saved as a PEFT adapter, any other one in a file format of this project.
    """

    length: Count = 20
    stacks: Texts = tuple(ATTENTION)

    def __post_init__(self):
        asked: Any = (self.stacks,) if isinstance(self.stacks, str) else self.stacks
        # One order, so that equal methods have equal fields; unknown names are kept for `check` to refuse.
        if not accepts(asked, Texts):
            return  # `check` refuses it
        known = [stack for stack in ATTENTION if stack in asked]
        object.__setattr__(self, "stacks", (*known, *(name for name in dict.fromkeys(asked) if name not in ATTENTION)))

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        check("stacks", self.stacks, Texts)
        if not self.stacks or not set(self.stacks) <= set(ATTENTION):
            raise SettingError(
                Setting("stacks"), f" is {self.stacks!r:.60}, expected {' or '.join(ATTENTION)}, or both of them"
            )
        super().check(config, input_length)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        paths = [f"{stack}/{name}" for stack in self.stacks for name in PREFIX]
        shapes = [prefix_shape(path.split("/")[0], self.length, model.parameters) for path in paths]
        keys = jax.random.split(key, len(paths))
        return {
            path: jax.random.normal(own, shape, jnp.float32)
            for path, shape, own in zip(paths, shapes, keys, strict=True)
        }

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(parameters=trained)

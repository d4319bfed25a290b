"""Low-rank prompts: DPT (Xiao et al. 2023, arXiv 2310.10094) and LoPT (Guo et al. 2024, arXiv 2406.19486).

    P = A B,    A [P, r],  B [r, D]

Both factors start uniform over [-0.5, 0.5), as in the code of DPT's authors (XYaoooo/DPT, modeling_t5.py).
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.settings import Count, check, integer
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class LowRankPrompt(Method):
    """Trains the two factors of the prompt: (P + D) r parameters.

        >>> LowRankPrompt(length=100, rank=10)
        LowRankPrompt(length=100, rank=10)

    Attributes:
      length: number of prompt positions, P.
      rank: number of columns of A and of rows of B, r. It is at most min(P, D), which is enough for any prompt. The
        authors use 10; ULPT's table 1 has 10 and 64.
    """

    length: Count = 100
    rank: Count = 10

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_a, of_b = jax.random.split(key)
        a = jax.random.uniform(of_a, (self.length, self.rank), jnp.float32, -0.5, 0.5)
        b = jax.random.uniform(of_b, (self.rank, model.config.emb_dim), jnp.float32, -0.5, 0.5)
        return {"a": a, "b": b}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(prompt=trained["a"] @ trained["b"])

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        shape = (self.length, config.emb_dim)
        check("rank", self.rank, integer(1, min(shape), f"the smaller side of a prompt of {list(shape)}"))
        super().check(config, input_length)

"""ULPT: trains a prompt in very few dimensions, by a frozen random projection (Wu et al. 2025, arXiv 2502.04501).

    P_ij = (sum_k Z_ik R_kj) s_j + b_j,    Z [P, r],  R [r, D] random and frozen,  s [D],  b [D]

Z starts standard normal, s at 1 and b at 0, as in the authors' code (MANGA-UOFA/ULPT).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.settings import Count, Seed, check, integer
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class ULPT(Method):
    """Trains Z, and one scale and one shift per feature: P r + 2 D parameters.

        >>> ULPT(length=100, rank=64)
        ULPT(length=100, rank=64, projection_seed=0)

    R depends only on `projection_seed`, r and D. It is neither trained nor stored: it is drawn again when it is needed,
    and the prompt that training returns no longer depends on it. The paper draws R standard normal; the authors' code
    draws it Xavier uniform, within sqrt(6 / (r + D)) of 0. Here it is drawn as in their code; s can learn another
    scale.

    Attributes:
      length: number of prompt positions, P.
      rank: number of columns of Z and of rows of R, r; at most D.
      projection_seed: seed of R. It does not follow the run's seed, so that runs with several seeds share one R.
    """

    length: Count = 100
    rank: Count = 64
    projection_seed: Seed = 0

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        width = model.config.emb_dim
        z = jax.random.normal(key, (self.length, self.rank), jnp.float32)
        return {"z": z, "scale": jnp.ones(width, jnp.float32), "shift": jnp.zeros(width, jnp.float32)}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        projected = trained["z"] @ self.projection(len(trained["scale"]))
        return Injection(prompt=projected * trained["scale"] + trained["shift"])

    def projection(self, width: int) -> Float[np.ndarray, "r D"]:
        """Returns R, [r, D], for a model with d_model `width`."""
        # NumPy keeps the numbers of RandomState in all versions (NEP 19), so a run can resume under another version.
        draw = np.random.RandomState(self.projection_seed)
        limit = (6 / (self.rank + width)) ** 0.5
        return draw.uniform(-limit, limit, (self.rank, width)).astype(np.float32)

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        check("rank", self.rank, integer(1, config.emb_dim, "the model's d_model"))
        super().check(config, input_length)

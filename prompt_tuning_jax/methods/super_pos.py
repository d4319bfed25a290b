"""SuperPos: trains prompts as superpositions of token embeddings (Sadraei Javaeri et al. 2024, arXiv 2406.05279).

    p_i = (E + dE_i) w_i,    E [D, m] frozen,  dE_i [D, m],  w_i [m]

The columns of E are the embeddings of m sampled tokens, the same ones for every position. Each position i has its own
change dE_i, which starts at 0, and its own weights w_i, without a softmax.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.prompts.initializers import SPECIAL_TOKENS, word_ids
from prompt_tuning_jax.settings import Count, Seed, check, integer
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.quantized import embedding_rows


@dataclasses.dataclass(frozen=True)
class SuperPos(Method):
    """Trains, for each position, a change to m token embeddings and their weights: P m (D + 1) parameters.

        >>> SuperPos(length=10, tokens=128)
        SuperPos(length=10, tokens=128, population=5000, token_seed=0)

    E is read from the base model's embedding table in every step, and is neither trained nor stored: weight decay pulls
    dE to 0, not E. The prompt that training returns no longer depends on E. The weights start normal with variance
    1 / m, so that a position starts at the scale of an embedding. No code of the authors was found; this start is our
    own choice.

    Attributes:
      length: number of prompt positions, P. Prompt tuning of the same length trains m + m / D times fewer parameters.
      tokens: the number of superposed embeddings, m. The paper finds no gain above 128.
      population: the tokens are drawn from the ids below it, which are the most common ones, without special tokens.
        None of these ids may be that of a sentinel or of a padding row of the embedding table.
      token_seed: seed of the draw. It does not follow the run's seed, so that the tokens depend only on the fields.
    """

    length: Count = 10
    tokens: Count = 128
    population: Count = 5_000
    token_seed: Seed = 0

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        words = word_ids(model.tokenizer, model.config.vocab_size)
        if self.population > words[-1] + 1:
            rest = f"expected at most {words[-1] + 1}: the ids from there on are sentinels and padding"
            raise SettingError(Setting("population"), f" is {self.population}, {rest}")
        if len(special := np.setdiff1d(self.token_ids(), words)):
            rest = (
                f" draws the ids {', '.join(map(str, special))}, which are special tokens of this tokenizer: "
                "set another"
            )
            raise SettingError(Setting("token_seed"), f"={self.token_seed}{rest}")
        weights = jax.random.normal(key, (self.length, self.tokens), jnp.float32) * self.tokens**-0.5
        change = jnp.zeros((self.length, self.tokens, model.config.emb_dim), jnp.float32)
        return {"weights": weights, "change": change}

    def apply(self, trained: Params, frozen: Params) -> Injection:
        weights, change = trained["weights"], trained["change"]
        superposed = weights @ self.embeddings(frozen)
        return Injection(prompt=superposed + jnp.einsum("pm,pmd->pd", weights, change))

    def token_ids(self) -> np.ndarray:
        """Returns the ids of the sampled tokens, int32 [m], all different."""
        # NumPy keeps the numbers of RandomState in all versions (NEP 19), so a run can resume under another version.
        draw = np.random.RandomState(self.token_seed)
        ids = SPECIAL_TOKENS + draw.permutation(self.population - SPECIAL_TOKENS)[: self.tokens]
        return ids.astype(np.int32)

    def embeddings(self, frozen: Params) -> Float[Array, "m D"]:
        """Returns the transpose of E in float32, from a base model's parameters of any dtype."""
        return embedding_rows(frozen, self.token_ids()).astype(jnp.float32)

    def check(self, config: T5Config, input_length: int) -> None:
        check_length(self.length, input_length)
        size = config.vocab_size
        if type(self.population) is int and self.population <= SPECIAL_TOKENS:
            found = f" is {self.population}, expected more than the {SPECIAL_TOKENS} special tokens"
            raise SettingError(Setting("population"), found)
        check("population", self.population, integer(1, size, "the rows of the model's embedding table"))
        drawn = self.population - SPECIAL_TOKENS
        check("tokens", self.tokens, integer(1, drawn, f"the tokens among the first {self.population} ids"))
        super().check(config, input_length)

"""LoRA: trains a low-rank change to frozen matrices (Hu et al. 2021, section 4.1), with PEFT's names and defaults."""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.targets import as_peft_names, check_targets, matrix_shapes, targeted_modules
from prompt_tuning_jax.settings import Count, Finite, Texts, check, integer
from prompt_tuning_jax.t5.adapters import LORA_A, LORA_B
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Trains A and B of W + (alpha / rank) A B for each target W; A starts random and B at zero, as in PEFT.

        >>> LoRA(rank=4, targets=("query", "value"))
        LoRA(rank=4, alpha=8.0, targets=('q', 'v'))

    The defaults are PEFT's for T5. As in PEFT, `alpha` does not change with `rank`, so that another rank does not need
    another learning rate.

    Attributes:
      rank: number of columns of A and of rows of B, r.
      alpha: the change is multiplied by alpha / rank.
      targets: matrices by PEFT's names for T5 (q k v o wi_0 wi_1 wo; `wi` in T5 1.0) or by T5X's (query key value out),
        in every attention and feed-forward layer of both stacks.
    """

    rank: Count = 8
    alpha: Finite = 8.0
    targets: Texts = ("q", "v")

    def __post_init__(self):
        object.__setattr__(self, "targets", as_peft_names(self.targets))

    def check(self, config: T5Config, input_length: int) -> None:
        check_targets(self.targets, config)
        shapes = matrix_shapes(config)
        narrow = min(self.targets, key=lambda name: min(shapes[name]))
        most = min(shapes[narrow])
        check("rank", self.rank, integer(1, most, f"the smaller side of {narrow}, which is {list(shapes[narrow])}"))
        if isinstance(self.alpha, (int, float)) and self.alpha == 0:
            raise SettingError(Setting("alpha"), f" is {self.alpha!r:.60}, expected a finite number other than 0")
        super().check(config, input_length)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        modules = targeted_modules(self.targets, model.parameters)
        trained = {}
        for module_key, (module, (inputs, outputs)) in zip(
            jax.random.split(key, len(modules)), modules.items(), strict=True
        ):
            bound = inputs**-0.5  # torch's default for a linear layer: kaiming_uniform_ with a = sqrt(5)
            shape = (inputs, self.rank)
            trained[f"{module}/{LORA_A}"] = jax.random.uniform(module_key, shape, jnp.float32, -bound, bound)
            trained[f"{module}/{LORA_B}"] = jnp.zeros((self.rank, outputs), jnp.float32)
        return trained

    def apply(self, trained: Params, frozen: Params) -> Injection:
        factor = self.alpha / self.rank
        return Injection(
            parameters={path: factor * value if path.endswith(LORA_B) else value for path, value in trained.items()}
        )

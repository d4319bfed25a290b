"""IA3: trains vectors that scale activations of a frozen model (Liu et al. 2022, T-Few, section 3.3; PEFT's names)."""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.targets import PEFT_NAMES, as_peft_names, check_targets, targeted_modules
from prompt_tuning_jax.settings import Texts, check
from prompt_tuning_jax.t5.adapters import INPUT_SCALE, OUTPUT_SCALE, split_path
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Trains a scale, from 1, per output feature of each target, and per input feature of those in `feedforward`.

        >>> IA3()
        IA3(targets=('k', 'v', 'wo'), feedforward=('wo',))

    The defaults are the paper's definition and PEFT's for T5: they scale the keys and values of every attention, and
    the input of the feed-forward layer's last matrix. Google's `extended/train/ia3.py` computes the same: it scales one
    of the two projections of a gated layer, which scales their elementwise product.

    Attributes:
      targets: matrices by PEFT's names for T5, or by T5X's; see `LoRA`.
      feedforward: the targets whose input is scaled, not their output.
    """

    targets: Texts = ("k", "v", "wo")
    feedforward: Texts = ("wo",)

    def __post_init__(self):
        object.__setattr__(self, "targets", as_peft_names(self.targets))
        object.__setattr__(self, "feedforward", as_peft_names(self.feedforward))

    def check(self, config: T5Config, input_length: int) -> None:
        check_targets(self.targets, config)
        check("feedforward", self.feedforward, Texts)
        for name in self.feedforward:
            if name not in self.targets:
                expected = f", expected some of {', '.join(self.targets)}, the names in "
                raise SettingError(Setting("feedforward"), f" has {name!r:.60}{expected}", Setting("targets"))
        super().check(config, input_length)

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        trained = {}
        for module, (inputs, outputs) in targeted_modules(self.targets, model.parameters).items():
            if PEFT_NAMES[split_path(module)[1]] in self.feedforward:
                trained[f"{module}/{INPUT_SCALE}"] = jnp.ones(inputs, jnp.float32)
            else:
                trained[f"{module}/{OUTPUT_SCALE}"] = jnp.ones(outputs, jnp.float32)
        return trained

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(parameters=trained)

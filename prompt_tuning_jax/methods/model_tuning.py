"""Model tuning, the paper's baseline: trains the base model's own parameters, all of them or some."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import jax

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.settings import Texts, as_tuple
from prompt_tuning_jax.t5.config import T5Config


@dataclasses.dataclass(frozen=True)
class ModelTuning(Method):
    """Trains the parameters whose paths match a pattern; they start at the base model's values.

    Attributes:
      parameters: regular expressions, each of a whole path; (r".*layer_norm/scale",) trains only the norms.
    """

    parameters: Texts = (".*",)

    def __post_init__(self):
        object.__setattr__(self, "parameters", as_tuple(self.parameters))

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        chosen = matching(model.parameters, self.parameters)
        return {path: value for path, value in model.parameters.items() if path in chosen}

    def check(self, config: T5Config, input_length: int) -> None:
        super().check(config, input_length)
        for pattern in self.parameters:
            try:
                re.compile(pattern)
            except re.error as error:
                raise SettingError(
                    Setting("parameters"), f" has {pattern!r:.60}, expected regular expressions of paths ({error})"
                ) from None

    def apply(self, trained: Params, frozen: Params) -> Injection:
        return Injection(parameters=trained)


def matching(paths: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Returns the paths that some pattern matches as a whole (`re.fullmatch`).

    Raises:
      ValueError: a pattern matches none of them.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"no parameter's path matches {pattern!r}; paths are like {paths[0]!r}")
    return {path for path in paths if any(re.fullmatch(pattern, path) for pattern in patterns)}

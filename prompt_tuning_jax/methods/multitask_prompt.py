"""Combines a shared prompt with parameters per task (google-research/prompt-tuning, extended/multitask_prompts.py).

S is the shared prompt, and T_k are the parameters of task k. The prompt of task k is
    add                    S [P, D] + T_k [P, D]
    concatenate            S [P_s, D], then T_k [P_t, D], along the positions
    concatenate_features   S [P, H_s] beside T_k [P, H_t], along the features: H_s + H_t = D
    project                W_k s_i + b_k for each position s_i of S [P, H_s]: T_k is W_k [D, H_s] and b_k [D]

In the official code, the first input token of a row says which task it belongs to; here the data says so. Shapes and
starts are the same: each T_k is one flat row of a [K, n] table.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import FrozenModel, Injection, Method, Params
from prompt_tuning_jax.methods.prompt_tuning import check_length
from prompt_tuning_jax.methods.task_prompts import check_tasks
from prompt_tuning_jax.prompts.initializers import Initializer, OfficialRandomUniform, start_prompt
from prompt_tuning_jax.settings import Count, OneOf, Positive, Text, Texts, as_tuple, check, integer
from prompt_tuning_jax.t5.config import T5Config

COMBINES = ("add", "concatenate", "concatenate_features", "project")
OFFICIAL_START = OfficialRandomUniform()


@dataclasses.dataclass(frozen=True, init=False)
class MultitaskPrompt(Method):
    """Trains a shared prompt, and parameters per task that are combined with it.

    Attributes:
      tasks: the names of the mixture's K tasks. `train` fills them in from its data if there are none.
      length: number of positions of the shared prompt.
      combine: how the two are combined, one of `COMBINES`.
      task_length: number of positions of a task's own prompt with "concatenate"; None for `length`.
      shared_features: H_s. None means half of D with "concatenate_features", and D with "project".
      scale: the parameters of a task start uniform over [0, scale); 0.5 in the official runs.
      initializer: how the shared prompt starts; see `prompts.initializers`. If H_s < D, the shared prompt gets the
        first H_s features of what the initialiser returns.
    """

    tasks: Texts
    length: Count
    combine: Text
    task_length: Count | None
    shared_features: Count | None
    scale: Positive
    initializer: Initializer

    def __init__(
        self,
        tasks: Texts = (),
        length: Count = 100,
        combine: Text = "add",
        task_length: Count | None = None,
        shared_features: Count | None = None,
        scale: Positive = 0.5,
        init: Initializer = OFFICIAL_START,
    ):
        fields = {
            "tasks": as_tuple(tasks),
            "length": length,
            "combine": combine,
            "task_length": task_length,
            "shared_features": shared_features,
            "scale": scale,
            "initializer": init,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _shared_features(self, width: int) -> int:
        if self.combine == "concatenate_features":
            return width // 2 if self.shared_features is None else self.shared_features
        if self.combine == "project":
            return width if self.shared_features is None else self.shared_features
        return width

    @property
    def _task_positions(self) -> int:
        """The number of positions that a task adds to those of the shared prompt."""
        if self.combine != "concatenate":
            return 0
        return self.length if self.task_length is None else self.task_length

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        of_shared, of_tasks = jax.random.split(key)
        width = model.config.emb_dim
        features = self._shared_features(width)
        size = {
            "add": self.length * width,
            "concatenate": self._task_positions * width,
            "concatenate_features": self.length * (width - features),
            "project": width * features + width,
        }[self.combine]
        return {
            "shared": start_prompt(self.initializer, of_shared, self.length, model)[:, :features],
            "tasks": jax.random.uniform(of_tasks, (len(self.tasks), size), jnp.float32, 0.0, self.scale),
        }

    def apply(self, trained: Params, frozen: Params) -> Injection:
        shared = trained["shared"]
        combine = {
            "add": _add,
            "concatenate": _concatenate,
            "concatenate_features": _concatenate_features,
            "project": _project,
        }[self.combine]
        own = zip(self.tasks, trained["tasks"], strict=True)
        return Injection(task_prompts={task: combine(shared, values) for task, values in own})

    def check(self, config: T5Config, input_length: int) -> None:
        check_tasks(self.tasks)
        check_length(self.length, input_length)
        check("combine", self.combine, OneOf(COMBINES))
        if self.task_length is not None:
            _check_used("task_length", ("concatenate",), self.combine)
        check_length(self.length + self._task_positions, input_length)
        if self.shared_features is not None:
            _check_used("shared_features", ("concatenate_features", "project"), self.combine)
            most = config.emb_dim - 1 if self.combine == "concatenate_features" else None
            check("shared_features", self.shared_features, integer(1, most, "one less than the model's d_model"))
        super().check(config, input_length)


def _add(shared: jax.Array, own: jax.Array) -> jax.Array:
    return shared + own.reshape(shared.shape)


def _concatenate(shared: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.concatenate([shared, own.reshape(-1, shared.shape[1])], axis=0)


def _concatenate_features(shared: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.concatenate([shared, own.reshape(len(shared), -1)], axis=1)


def _project(shared: jax.Array, own: jax.Array) -> jax.Array:
    features = shared.shape[1]
    width = len(own) // (features + 1)
    kernel, bias = own[: width * features].reshape(width, features), own[width * features :]
    return shared @ kernel.T + bias


def _check_used(name: str, by: tuple[str, ...], combine: str) -> None:
    """Raises SettingError if `combine` is not one of the ways, `by`, that read the setting `name`."""
    if combine not in by:
        readers = " and ".join(map(repr, by))
        raise SettingError(Setting(name), f" is only for {readers}: leave it out, or set ", Setting("combine"))

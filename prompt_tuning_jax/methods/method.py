"""The seam between training and what is trained: a `Method` gives trainable parameters and an `Injection`.

Training, sweeps, memory plans, checkpoints, evaluation and prediction know these two and no method by name. A new
method is one subclass:

    @dataclasses.dataclass(frozen=True)
    class ScaledPrompt(Method):
        length: int

        def init(self, key, model):
            start = SampledVocabulary()(key, self.length, model)
            return {"prompt": start, "scale": jnp.ones(start.shape[1])}

        def apply(self, trained, frozen):
            return Injection(prompt=trained["scale"] * trained["prompt"])
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from prompt_tuning_jax.errors import renamed
from prompt_tuning_jax.settings import check_fields
from prompt_tuning_jax.t5.config import T5Config

Params = dict[str, jax.Array]


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of sequence."""
        ...


if TYPE_CHECKING:

    class FrozenModel(Protocol):
        """What a method's start may depend on: a base model, which is only read.

        Attributes:
          config: its size.
          parameters: by path, "encoder/layers_0/mlp/wi_0/kernel".
          tokenizer: its own.
        """

        @property
        def config(self) -> T5Config: ...
        @property
        def parameters(self) -> Mapping[str, jax.Array]: ...
        @property
        def tokenizer(self) -> Tokenizer: ...
        @property
        def embeddings(self) -> Float[Array, "V D"]:
            """The embedding table, in floats."""
            ...

else:  # before Python 3.12 a check of a protocol reads each property, and this one's table may lie on many devices
    FrozenModel = Any


class Injection(NamedTuple):
    """What the frozen model runs with.

    Attributes:
      prompt: in front of the encoder's input.
      layer_prompts: one for each encoder layer, L of them. Alone, the first is put in front of the encoder's input, and
        each of the others replaces what the layer before made of those P positions. Beside a `prompt`, each is added to
        the P positions that enter its layer.
      parameters: by path. One of the path of a frozen parameter takes its place. Beside a kernel there may be
        `.../lora_a` [in, r] and `.../lora_b` [r, out] (see `t5.layers.Dense`), `.../input_scale` [in] and
        `.../output_scale` [out]: all of them change what the kernel's layer computes, and leave the kernel alone.
        `encoder/prefix_key` and `prefix_value`, `decoder/prefix_key` and `prefix_value` [L, H, P, K] are what each
        layer of the stack attends to before its own keys and values (see `t5.adapters`).
      task_prompts: by task, in place of a `prompt` for all rows; all of one shape. See `of_task` and `of_rows`.
    """

    prompt: Float[Array, "P D"] | None = None
    layer_prompts: Float[Array, "L P D"] | None = None
    parameters: Mapping[str, Array] = {}
    task_prompts: Mapping[str, Float[Array, "P D"]] | None = None

    @property
    def length(self) -> int:
        """The number of positions in front of the encoder's input, P; 0 if there is no prompt."""
        for prompt in (self.prompt, self.layer_prompts, *(self.task_prompts or {}).values()):
            if prompt is not None:
                return prompt.shape[-2]
        return 0

    @property
    def prompts(self) -> dict[str, Any]:
        """The prompts, as `Transformer.encode` takes them."""
        return {"prompt": self.prompt, "layer_prompts": self.layer_prompts}

    def of_task(self, task: str) -> "Injection":
        """Returns the injection of the rows of one task, with the task's own prompt if there is one per task."""
        if self.task_prompts is None:
            return self
        return self._replace(prompt=self.task_prompts[task], task_prompts=None)

    def of_rows(self, tasks: Int[Array, " B"] | None) -> "Injection":
        """Returns the injection of a batch, with a prompt per row, [B, P, D], if there is one per task.

        Args:
          tasks: of each row, the index of its task among the sorted names of `task_prompts`.
        """
        if self.task_prompts is None:
            return self
        prompts = jnp.stack([self.task_prompts[task] for task in sorted(self.task_prompts)])
        # A matmul with ones and zeros, exact in float32, in place of `prompts[tasks]`: the gradient of an index is a
        # scatter, which adds in another order each time on a GPU.
        rows = jax.nn.one_hot(tasks, len(prompts), dtype=prompts.dtype)
        own = jnp.einsum("bk,kpd->bpd", rows, prompts, precision=jax.lax.Precision.HIGHEST)
        return self._replace(prompt=own, task_prompts=None)


def tasks_of(method: "Method") -> Sequence[str] | Any:
    """Returns the tasks that a method trains a prompt each for; None if it trains the same for all rows."""
    return getattr(method, "tasks", None)


def merge(parameters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """Returns the nested parameters that a model is applied to, `parameters` before frozen ones of the same path."""
    return unflatten_dict({**frozen, **parameters}, sep="/")


def start_key(seed: int) -> jax.Array:
    """Returns the key that `Method.init` is called with in a run of this seed."""
    return jax.random.fold_in(jax.random.key(seed), 1)


class Method:
    """What is trained, and what the frozen model runs with.

    A method is a frozen dataclass: its fields are part of a run's identity. A trained parameter that has the path of a
    base model's parameter takes that parameter's place, and the base model's own value is not kept in memory.

    A method of one prompt per task has the field `tasks`, their names.
    """

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        """Returns the trainable parameters before the first step, by name; a function of the arguments alone."""
        raise NotImplementedError

    def apply(self, trained: Params, frozen: Params) -> Injection:
        """Returns what the frozen model is called with, as a differentiable function of the trained parameters.

        Args:
          trained: as `init` returned them, float32, after any number of updates.
          frozen: the base model's parameters by path, but for those that are trained.
        """
        raise NotImplementedError

    def check(self, config: T5Config, input_length: int) -> None:
        """Raises `SettingError` if the method's fields are impossible for a model of this size.

        Here: if a field is not what its annotation of `settings` says. A method that checks more calls this, too.

        Args:
          input_length: the most tokens of inputs, end of sequence included.
        """
        if dataclasses.is_dataclass(self):
            with renamed(length="prompt_length", initializer="prompt_init"):
                check_fields(self)

    def start_line(self) -> str | None:
        """Returns a line that says where the start is from, if that was chosen among several."""
        chosen = getattr(getattr(self, "initializer", None), "chosen", None)
        return None if chosen is None else chosen()

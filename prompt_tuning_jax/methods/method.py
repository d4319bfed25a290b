"""Defines `Method`, which says what is trained, and `Injection`, which says what the frozen model runs with.

Training, sweeps, memory plans, checkpoints, evaluation and prediction know only these two classes, and no method by
name. A new method is one subclass:

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
        """Returns the ids of `text`, without an end of sequence."""
        ...


if TYPE_CHECKING:

    class FrozenModel(Protocol):
        """A base model, as far as `Method.init` may read it.

        Attributes:
          config: the model's size and numerics.
          parameters: the parameters by path, such as "encoder/layers_0/mlp/wi_0/kernel".
          tokenizer: the model's own tokenizer.
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

else:  # before Python 3.12, isinstance of a protocol reads each property, and this table may lie on many devices
    FrozenModel = Any


class Injection(NamedTuple):
    """Holds what the frozen model runs with.

    Attributes:
      prompt: put in front of the encoder's input.
      layer_prompts: one prompt for each of the L encoder layers. Without a `prompt`, the first is put in front of the
        encoder's input, and each other one replaces the P positions that the previous layer returned. With a `prompt`,
        each is added to the P positions that enter its layer.
      parameters: parameters by path. One with the path of a frozen parameter replaces it. `.../lora_a` [in, r] and
        `.../lora_b` [r, out], `.../input_scale` [in] and `.../output_scale` [out] beside a kernel change what the
        kernel's layer computes, and do not change the kernel (see `t5.layers.Dense`). `encoder/prefix_key` and
        `prefix_value`, `decoder/prefix_key` and `prefix_value` [L, H, P, K] are learned keys and values in front of
        those that each layer of the stack computes (see `t5.adapters`).
      task_prompts: a prompt for each task by name, instead of one `prompt` for all rows; all have one shape. See
        `of_task` and `of_rows`.
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
        """Returns the injection for rows of one task: with the task's own prompt if there is one per task."""
        if self.task_prompts is None:
            return self
        return self._replace(prompt=self.task_prompts[task], task_prompts=None)

    def of_rows(self, tasks: Int[Array, " B"] | None) -> "Injection":
        """Returns the injection for a batch: with a prompt per row, [B, P, D], if there is one per task.

        Args:
          tasks: the index of each row's task among the sorted names of `task_prompts`.
        """
        if self.task_prompts is None:
            return self
        prompts = jnp.stack([self.task_prompts[task] for task in sorted(self.task_prompts)])
        # A matmul with zeros and ones, which is exact in float32, instead of `prompts[tasks]`: the gradient of indexing
        # is a scatter, which a GPU adds up in another order each time.
        rows = jax.nn.one_hot(tasks, len(prompts), dtype=prompts.dtype)
        own = jnp.einsum("bk,kpd->bpd", rows, prompts, precision=jax.lax.Precision.HIGHEST)
        return self._replace(prompt=own, task_prompts=None)


def tasks_of(method: "Method") -> Sequence[str] | Any:
    """Returns the names of a method's tasks if it trains one prompt per task; None if all rows share what it trains."""
    return getattr(method, "tasks", None)


def merge(parameters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """Returns the nested parameters for `Transformer.apply`; `parameters` replace frozen ones of the same path."""
    return unflatten_dict({**frozen, **parameters}, sep="/")


def start_key(seed: int) -> jax.Array:
    """Returns the key that `Method.init` is called with in a run of this seed."""
    return jax.random.fold_in(jax.random.key(seed), 1)


class Method:
    """Says what is trained, and what the frozen model runs with.

    A method is a frozen dataclass: its fields are part of a run's identity. A trained parameter with the path of a base
    model's parameter replaces it, and the base model's own value is not kept in memory.

    A method that trains one prompt per task has a field `tasks`, the names of its tasks.
    """

    def init(self, key: jax.Array, model: FrozenModel) -> Params:
        """Returns the trainable parameters before the first step, by name; they depend only on the arguments."""
        raise NotImplementedError

    def apply(self, trained: Params, frozen: Params) -> Injection:
        """Returns what the frozen model is called with: a differentiable function of the trained parameters.

        Args:
          trained: the parameters that `init` returned, float32, after any number of updates.
          frozen: the base model's parameters by path, without those that are trained.
        """
        raise NotImplementedError

    def check(self, config: T5Config, input_length: int) -> None:
        """Raises `SettingError` if the method's fields are invalid for a model of this size.

        The base class checks each field against its annotation from `settings`. A subclass that checks more also calls
        this method.

        Args:
          input_length: the largest number of input tokens per row, end of sequence included.
        """
        if dataclasses.is_dataclass(self):
            with renamed(length="prompt_length", initializer="prompt_init"):
                check_fields(self)

    def start_line(self) -> str | None:
        """Returns a line that says which prompt the start is, if the initialiser chose it among several; else None."""
        chosen = getattr(getattr(self, "initializer", None), "chosen", None)
        return None if chosen is None else chosen()

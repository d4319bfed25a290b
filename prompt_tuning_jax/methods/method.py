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

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from prompt_tuning_jax.t5.config import T5Config

Params = dict[str, jax.Array]


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end of sequence."""
        ...


@runtime_checkable
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
    """

    prompt: Float[Array, "P D"] | None = None
    layer_prompts: Float[Array, "L P D"] | None = None
    parameters: Mapping[str, Array] = {}

    @property
    def length(self) -> int:
        """The number of positions in front of the encoder's input, P; 0 if there is no prompt."""
        for prompt in (self.prompt, self.layer_prompts):
            if prompt is not None:
                return prompt.shape[-2]
        return 0

    @property
    def prompts(self) -> dict[str, Any]:
        """The prompts, as `Transformer.encode` takes them."""
        return {"prompt": self.prompt, "layer_prompts": self.layer_prompts}


def merge(parameters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict:
    """Returns the nested parameters that a model is applied to, `parameters` before frozen ones of the same path."""
    return unflatten_dict({**frozen, **parameters}, sep="/")


class Method:
    """What is trained, and what the frozen model runs with.

    A method is a frozen dataclass: its fields are part of a run's identity. A trained parameter that has the path of a
    base model's parameter takes that parameter's place, and the base model's own value is not kept in memory.
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

        Args:
          input_length: the most tokens of inputs, end of sequence included.
        """

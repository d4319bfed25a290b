"""Computes the shapes of a method's parameters without arrays, and checks what the method gives a base model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.methods.method import Injection, Method, tasks_of
from prompt_tuning_jax.prompts.initializers import SPECIAL_TOKENS
from prompt_tuning_jax.t5.adapters import check_parameters
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.quantized import TABLE, embedding_table, scale_path

Shapes = Mapping[str, Any]  # arrays, or their shapes and dtypes


class AnyTokenizer:
    """Replaces a tokenizer where only shapes count: it encodes every text as one token, which is not a special one."""

    def encode(self, text: str) -> list[int]:
        return [SPECIAL_TOKENS]


class ShapeModel(NamedTuple):
    """Replaces a base model in `Method.init` while it is traced: its parameters are tracers."""

    config: T5Config
    parameters: Mapping[str, Any]
    tokenizer: Any = AnyTokenizer()

    @property
    def embeddings(self) -> Any:
        return embedding_table(self.parameters)


def start_shapes(method: Method, config: T5Config, base: Shapes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the shapes of the trained and of the frozen parameters, both by name, without making an array.

    Args:
      base: the base model's parameters by path, or their shapes.

    Returns:
      `(trained, frozen)`; the trained ones are float32.
    """

    def start(parameters: Mapping[str, Any]) -> dict[str, Any]:
        trained = method.init(jax.random.key(0), ShapeModel(config, parameters))
        return {name: jnp.asarray(value, jnp.float32) for name, value in trained.items()}

    trained = jax.eval_shape(start, dict(base))
    return trained, {path: value for path, value in base.items() if path not in trained}


def check_injection(method: Method, injection: Injection, config: T5Config, base: Shapes) -> None:
    """Raises ValueError if what a method gives does not fit the model: Flax would ignore an unknown parameter.

    Args:
      injection: what the method's `apply` returned: arrays or their shapes.
      base: the base model's parameters by path, including those that are trained.

    Raises:
      ValueError: a shape does not fit, or the model has no such parameter.
    """
    name, wide = type(method).__name__, config.emb_dim
    prompt, deep = injection.prompt, injection.layer_prompts
    if prompt is not None and (len(prompt.shape) != 2 or prompt.shape[1] != wide):
        raise ValueError(f"{name} gives a prompt of shape {list(prompt.shape)}, expected [P, {wide}]")
    if deep is not None:
        layers = config.num_encoder_layers
        length = "P" if prompt is None else prompt.shape[0]
        if (
            len(deep.shape) != 3
            or (deep.shape[0], deep.shape[2]) != (layers, wide)
            or length not in ("P", deep.shape[1])
        ):
            raise ValueError(
                f"{name} gives layer prompts of shape {list(deep.shape)}, expected [{layers}, {length}, {wide}]"
            )
    own = injection.task_prompts
    if own is not None:
        found = sorted({tuple(one.shape) for one in own.values()})
        if prompt is not None or deep is not None:
            raise ValueError(f"{name} gives a prompt per task beside another prompt, expected one of them")
        if sorted(own) != sorted(tasks_of(method) or ()):
            raise ValueError(f"{name} gives prompts for {sorted(own)}, expected one for each of its `tasks`")
        if len(found) != 1 or len(found[0]) != 2 or found[0][1] != wide:
            shapes = " and ".join(str(list(shape)) for shape in found)
            raise ValueError(f"{name} gives prompts of shape {shapes}, expected [P, {wide}] for every task")
    for path in injection.parameters:
        if path in base and scale_path(path) in base:
            raise ValueError(f"{name} replaces {path}, but the base model is int8, which is only read")
    check_parameters(injection.parameters, base)


def trains_base(trained: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Returns whether parameters of the base model itself are trained."""
    return any(path in base for path in trained)


def check_not_int8(trained: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises SettingError if the base model is int8 and its own parameters are trained: int8 is only read."""
    own = sorted(path for path in trained if path in base)
    if own and scale_path(TABLE) in base:
        raise SettingError(
            f"{own[0]} is to be trained, but the base model is int8, which is only read: set ",
            Setting("base_dtype"),
            " to 'float32' or 'bfloat16'",
        )

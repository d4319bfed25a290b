"""Adapters beside a frozen kernel: low-rank matrices (LoRA, Hu et al. 2021) and scales (IA3, Liu et al. 2022).

An adapter is a float32 parameter of the kernel's own module, at ".../query/lora_a" beside ".../query/kernel". `Dense`
computes with those that it finds

    y = ((x * input_scale) @ kernel + ((x * input_scale) @ lora_a) @ lora_b) * output_scale

where LoRA's factor alpha / rank is part of `lora_b`.

A prefix (Li and Liang 2021) stands in a stack, at "decoder/prefix_key" and "decoder/prefix_value", both [L, H, P, K]:
layer l attends to the P keys and values of its own before those that it computes. In the decoder this is its
self-attention.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from prompt_tuning_jax.errors import Setting, SettingError, near_misses

LORA_A, LORA_B, INPUT_SCALE, OUTPUT_SCALE = ADAPTERS = ("lora_a", "lora_b", "input_scale", "output_scale")

PREFIX_KEY, PREFIX_VALUE = PREFIX = ("prefix_key", "prefix_value")
PAIRS = {LORA_A: LORA_B, LORA_B: LORA_A, PREFIX_KEY: PREFIX_VALUE, PREFIX_VALUE: PREFIX_KEY}
ATTENTION = {"encoder": "attention", "decoder": "self_attention"}  # the module of each layer that a prefix enters


def split_path(path: str) -> tuple[str, str]:
    """Returns a parameter's module and its own name: "encoder/layers_0/mlp/wo" and "kernel"."""
    module, _, name = path.rpartition("/")
    return module, name


def is_adapter(path: str) -> bool:
    """Returns whether the parameter at `path` stands beside a kernel and changes what its layer computes."""
    return split_path(path)[1] in ADAPTERS


def is_prefix(path: str) -> bool:
    """Returns whether the parameter at `path` is a stack's prefix of keys or values."""
    stack, name = split_path(path)
    return stack in ATTENTION and name in PREFIX


def adapted_modules(parameters: Mapping[str, ArrayLike]) -> dict[str, dict[str, ArrayLike]]:
    """Returns the adapters among `parameters` by their module's path, each module's by their own names."""
    modules: dict[str, dict[str, ArrayLike]] = {}
    for path in sorted(filter(is_adapter, parameters)):
        module, name = split_path(path)
        modules.setdefault(module, {})[name] = parameters[path]
    return modules


def check_parameters(parameters: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Refuses parameters that the model would not read, which Flax ignores in silence.

    Args:
      parameters: an injection's, by path: arrays, or anything with a shape.
      base: all parameters of the base model by path, with those that are replaced.

    Raises:
      ValueError: a path is neither a base model's parameter, nor an adapter beside a kernel, nor a stack's prefix; an
        adapter or a prefix is half of a pair; or a shape does not fit. The message names near misses.
    """
    for path, value in parameters.items():
        module, name = split_path(path)
        kernel = base.get(f"{module}/kernel")
        other = PAIRS.get(name, name)
        if (is_prefix(path) or (is_adapter(path) and kernel is not None)) and f"{module}/{other}" not in parameters:
            raise ValueError(f"the method gives {path} without {other} beside it, expected both")
        if is_prefix(path):
            length = parameters[f"{module}/{PREFIX_KEY}"].shape[-2]
            expected = prefix_shape(module, length, base)
        elif is_adapter(path) and kernel is not None:
            rank = parameters[f"{module}/{LORA_A}"].shape[-1:] if name in (LORA_A, LORA_B) else ()
            inputs, outputs = kernel.shape
            expected = {
                LORA_A: (inputs, *rank),
                LORA_B: (*rank, outputs),
                INPUT_SCALE: (inputs,),
                OUTPUT_SCALE: (outputs,),
            }[name]
        elif path in base:
            expected = tuple(base[path].shape)
        else:
            known = [*base] if kernel is None else [f"{module}/{name}" for name in ("kernel", *ADAPTERS)]
            hint = near_misses(f"{module}/{name.lower()}", known, otherwise="")
            raise ValueError(
                f"the method gives a parameter {path}, which the model does not read, expected the path of one of its "
                f"own, {', '.join(ADAPTERS)} beside a kernel, or {' and '.join(PREFIX)} of a stack{hint and '; '}{hint}"
            )
        if tuple(value.shape) != expected:
            raise ValueError(f"the method gives {path} of shape {list(value.shape)}, expected {list(expected)}")


def prefix_shape(stack: str, length: int, base: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Returns the shape [L, H, P, K] of a stack's prefix of keys, which is that of the values, too.

    Args:
      stack: "encoder" or "decoder".
      length: P.
      base: a base model's parameters by path, or their shapes.
    """
    matrices = [path for path in base if re.fullmatch(rf"{stack}/layers_\d+/{ATTENTION[stack]}/key/kernel", path)]
    table = re.compile(rf"{stack}/(layers_\d+/)?relpos_bias/rel_embedding")  # one per stack, or one per layer
    heads = next(base[path].shape[0] for path in base if table.fullmatch(path))
    return len(matrices), heads, length, base[matrices[0]].shape[1] // heads


def merged(parameters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of the plain model that computes what `frozen` with `parameters` does.

    Adapters are folded into their kernels in float32, and such kernels are float32 whatever they were: rounded to
    bfloat16 they would lose what was learned. Replaced parameters are taken as they are, all others are `frozen`'s own
    arrays, not copied. A prefix changes no matrix: it stays a parameter beside them, which the model reads.

        >>> frozen = {"a/kernel": jnp.ones((2, 3)), "b/scale": jnp.ones(2)}
        >>> merged({"a/output_scale": jnp.arange(3.0)}, frozen)["a/kernel"]
        Array([[0., 1., 2.],
               [0., 1., 2.]], dtype=float32)

    Args:
      parameters: an injection's, by path.
      frozen: the base model's, by path; those that are replaced may be absent.

    Raises:
      SettingError: an adapter's kernel is int8, which has no room for what was learned.
    """
    whole = {**frozen, **{path: value for path, value in parameters.items() if not is_adapter(path)}}
    for module, adapters in adapted_modules(parameters).items():
        path = f"{module}/kernel"
        if whole[path].dtype == jnp.int8:
            raise SettingError(
                f"adapters cannot be merged into {path}, which is int8, expected a base model in floats: set ",
                Setting("base_dtype"),
                " to 'float32' or 'bfloat16'",
            )
        whole[path] = _merge(whole[path], adapters)
    return whole


@jax.jit
def _merge(kernel: Float[Array, "d_in d_out"], adapters: dict[str, Any]) -> Float[Array, "d_in d_out"]:
    kernel = kernel.astype(jnp.float32)
    if LORA_A in adapters:
        # Accelerators multiply float32 matrices in fewer bits unless told otherwise.
        kernel = kernel + jnp.dot(adapters[LORA_A], adapters[LORA_B], precision=jax.lax.Precision.HIGHEST)
    if INPUT_SCALE in adapters:
        kernel = kernel * adapters[INPUT_SCALE][:, None]
    return kernel * adapters[OUTPUT_SCALE] if OUTPUT_SCALE in adapters else kernel

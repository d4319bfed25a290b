"""Names, checks and merges adapters and prefixes: parameters that change what a frozen layer computes.

An adapter is a float32 parameter of a kernel's own module, such as ".../query/lora_a" beside ".../query/kernel": a
low-rank matrix (LoRA, Hu et al. 2021) or a scale (IA3, Liu et al. 2022). `layers.Dense` uses the adapters it finds:

    y = ((x * input_scale) @ kernel + ((x * input_scale) @ lora_a) @ lora_b) * output_scale

`lora_b` already includes LoRA's factor alpha / rank.

A prefix (Li and Liang 2021) is a pair of parameters of a whole stack, such as "decoder/prefix_key" and
"decoder/prefix_value", both [L, H, P, K]. They put P learned keys and values per layer in front of the keys and values
that the layer computes. In the decoder, only self-attention reads them.
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
ATTENTION = {"encoder": "attention", "decoder": "self_attention"}  # a layer's module that reads the prefix


def split_path(path: str) -> tuple[str, str]:
    """Returns a parameter's module and its own name: "encoder/layers_0/mlp/wo" and "kernel"."""
    module, _, name = path.rpartition("/")
    return module, name


def is_adapter(path: str) -> bool:
    """Returns whether `path` is that of an adapter, which stands beside a kernel and changes the layer's output."""
    return split_path(path)[1] in ADAPTERS


def is_prefix(path: str) -> bool:
    """Returns whether `path` is that of a stack's prefix of keys or of values."""
    stack, name = split_path(path)
    return stack in ATTENTION and name in PREFIX


def adapted_modules(parameters: Mapping[str, ArrayLike]) -> dict[str, dict[str, ArrayLike]]:
    """Returns the adapters among `parameters`, as `{module path: {adapter name: array}}`."""
    modules: dict[str, dict[str, ArrayLike]] = {}
    for path in sorted(filter(is_adapter, parameters)):
        module, name = split_path(path)
        modules.setdefault(module, {})[name] = parameters[path]
    return modules


def check_parameters(parameters: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises ValueError for parameters that the model would not read: Flax would ignore them silently.

    Args:
      parameters: an injection's parameters by path: arrays, or anything with a shape.
      base: all parameters of the base model by path, including those that `parameters` replaces.

    Raises:
      ValueError: a path is neither that of a base model's parameter, nor of an adapter beside a kernel, nor of a
        stack's prefix; an adapter or a prefix lacks the other half of its pair; or a shape does not fit. The message
        names near misses.
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
    """Returns [L, H, P, K], the shape of a stack's `prefix_key` and of its `prefix_value`.

    Args:
      stack: "encoder" or "decoder".
      length: number of learned keys per layer, P.
      base: a base model's parameters by path, or their shapes.
    """
    matrices = [path for path in base if re.fullmatch(rf"{stack}/layers_\d+/{ATTENTION[stack]}/key/kernel", path)]
    table = re.compile(rf"{stack}/(layers_\d+/)?relpos_bias/rel_embedding")  # one per stack, or one per layer
    heads = next(base[path].shape[0] for path in base if table.fullmatch(path))
    return len(matrices), heads, length, base[matrices[0]].shape[1] // heads


def merged(parameters: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters with which the plain model computes what `frozen` and `parameters` compute together.

    Adapters are folded into their kernels in float32. These kernels stay float32, whatever dtype they had: rounding
    them to bfloat16 would lose what was learned. Parameters that replace others are taken as they are. All other
    arrays are those of `frozen`, not copies. A prefix cannot be folded into a matrix: it stays a parameter of its own,
    which the model reads.

        >>> frozen = {"a/kernel": jnp.ones((2, 3)), "b/scale": jnp.ones(2)}
        >>> merged({"a/output_scale": jnp.arange(3.0)}, frozen)["a/kernel"]
        Array([[0., 1., 2.],
               [0., 1., 2.]], dtype=float32)

    Args:
      parameters: an injection's parameters by path.
      frozen: the base model's parameters by path; those that `parameters` replaces may be absent.

    Raises:
      SettingError: an adapter's kernel is int8, which is too coarse to hold what was learned.
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
        # By default, accelerators multiply float32 matrices in a lower precision.
        kernel = kernel + jnp.dot(adapters[LORA_A], adapters[LORA_B], precision=jax.lax.Precision.HIGHEST)
    if INPUT_SCALE in adapters:
        kernel = kernel * adapters[INPUT_SCALE][:, None]
    return kernel * adapters[OUTPUT_SCALE] if OUTPUT_SCALE in adapters else kernel

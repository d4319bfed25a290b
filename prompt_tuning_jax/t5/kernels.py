"""Computes matmuls, attention and the gated GELU, with backward passes that keep few intermediate results.

JAX's own derivatives of attention and GELU keep every intermediate result and read each of them again. The derivatives
here keep only what the backward pass needs; the values are the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int8

MATMUL = "matmul"  # the name of a matmul's result, for the policies of rematerialisation
# Added to the logit of a masked position, as in T5X. The position's softmax weight is then exactly 0 in float32.
MASKED = -1e10


def matmul(x: Float[Array, "*B d_in"], kernel: Float[Array, "d_in d_out"], dtype: Any) -> Float[Array, "*B d_out"]:
    """Returns `x @ kernel` in `dtype`, summed in float32."""
    # A CPU's matmul of two bfloat16 matrices gives float32. Asked for another dtype, XLA would convert both first.
    if x.dtype == kernel.dtype and (jax.default_backend() == "cpu" or (x.dtype, dtype) == (jnp.bfloat16, jnp.float32)):
        return checkpoint_name(_matmul(x, kernel).astype(dtype), MATMUL)
    return jnp.dot(x, kernel, preferred_element_type=dtype)


@jax.custom_vjp
def _matmul(x: Float[Array, "*B d_in"], kernel: Float[Array, "d_in d_out"]) -> Float[Array, "*B d_out"]:
    return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


def _matmul_forward(x, kernel):
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    of_x = lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    # Both become matrices first. With more axes, XLA for CPUs would write a transposed copy of one, as it does for
    # JAX's own derivative of `jnp.dot`.
    rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    of_kernel = lax.dot_general(rows, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_matmul(
    x: Float[Array, "*B d_in"], kernel: Int8[Array, "d_in d_out"], scale: Float[Array, " d_out"], dtype: Any
) -> Float[Array, "*B d_out"]:
    """Returns `x @ (kernel * scale)` in `dtype`, summed in float32. Kernel and scale are frozen: they get no gradient.

    The matmul reads the kernel's int8 values, which are exact in bfloat16 as well. The sums are scaled afterwards.
    """
    x, kernel = _when_needed(x, kernel)
    sums = jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return (sums * scale).astype(dtype)


def _when_needed(x: Float[Array, "*B d"], kernel: Int8[Array, "d_in d_out"]) -> tuple[Array, Array]:
    """Returns both unchanged, but makes the kernel wait for `x`.

    Otherwise XLA would convert the kernels in a loop's body before the loop, or keep the converted kernels of the
    forward pass for the backward pass. Then all of them would be in memory as floats at once.
    """
    return lax.optimization_barrier((x, kernel))


def _quantized_matmul_forward(x, kernel, scale, dtype):
    return quantized_matmul(x, kernel, scale, dtype), (jnp.zeros((), x.dtype), kernel, scale)


def _quantized_matmul_backward(dtype, residuals, gradient):
    like_x, kernel, scale = residuals
    gradient, kernel = _when_needed((gradient.astype(jnp.float32) * scale).astype(like_x.dtype), kernel)
    axes = (((gradient.ndim - 1,), (1,)), ((), ()))
    of_x = lax.dot_general(gradient, kernel.astype(like_x.dtype), axes, preferred_element_type=jnp.float32)
    return of_x.astype(like_x.dtype), None, None


quantized_matmul.defvjp(_quantized_matmul_forward, _quantized_matmul_backward)


@jax.custom_vjp
def attend(
    query: Float[Array, "B H Q head_dim"],
    key: Float[Array, "B H K head_dim"],
    value: Float[Array, "B H K head_dim"],
    bias: Float[Array, "1 H Q K"] | None,
    mask: Bool[Array, "#B 1 #Q K"] | None,
) -> Float[Array, "B H Q head_dim"]:
    """Returns `softmax(query @ key + bias) @ value`, with float32 softmax; keys are masked where `mask` is false."""
    return _attend(query, key, value, bias, mask)[0]


def _attend(query, key, value, bias, mask):
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        # Added, not selected: XLA for CPUs fuses a sum into the matmul before it, but not a selection.
        scores = scores + jnp.where(mask, 0.0, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # Normalised after the second einsum: a row of its result has head_dim numbers, and a row of weights one per key.
    scale = 1 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32)
    return (mixed * scale).astype(value.dtype), weights, scale


def _attend_forward(query, key, value, bias, mask):
    mixed, weights, scale = _attend(query, key, value, bias, mask)
    return mixed, (query, key, value, bias, weights, scale, mixed)


def _attend_backward(residuals, gradient):
    query, key, value, bias, weights, scale, mixed = residuals
    dtype = value.dtype
    gradient = gradient * scale
    # delta = rowsum(dO * O), the softmax backward term, as in FlashAttention; here it is multiplied by `scale`.
    common = jnp.sum(gradient * mixed, axis=-1, keepdims=True)
    gradient = gradient.astype(dtype)
    of_value = jnp.einsum("bhqk,bhqd->bhkd", weights, gradient, preferred_element_type=jnp.float32)
    of_weights = jnp.einsum("bhqd,bhkd->bhqk", gradient, value, preferred_element_type=jnp.float32)
    of_scores = weights * (of_weights - common)
    of_bias = None if bias is None else jnp.sum(of_scores, axis=0, keepdims=True).astype(bias.dtype)
    of_scores = of_scores.astype(dtype)
    of_query = jnp.einsum("bhqk,bhkd->bhqd", of_scores, key, preferred_element_type=jnp.float32)
    of_key = jnp.einsum("bhqk,bhqd->bhkd", of_scores, query, preferred_element_type=jnp.float32)
    return of_query.astype(dtype), of_key.astype(dtype), of_value.astype(dtype), of_bias, None


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def gated_gelu(gate: Float[Array, "*B F"], linear: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Returns `gelu(gate) * linear`, with GELU's tanh approximation (Hendrycks and Gimpel 2016), as in T5."""
    return jax.nn.gelu(gate) * linear


def _gated_gelu_forward(gate, linear):
    return gated_gelu(gate, linear), (gate, linear)


def _gated_gelu_backward(residuals, gradient):
    gate, linear = residuals
    x, gradient = gate.astype(jnp.float32), gradient.astype(jnp.float32)
    slope, cubic = np.float32(np.sqrt(2 / np.pi)), np.float32(0.044715)
    tanh = jnp.tanh(slope * x * (1 + cubic * x * x))
    share = 0.5 * (1 + tanh)  # gelu(x) = x * share
    derivative = share + 0.5 * x * (1 - tanh * tanh) * slope * (1 + 3 * cubic * x * x)
    return (gradient * linear * derivative).astype(gate.dtype), (gradient * x * share).astype(linear.dtype)


gated_gelu.defvjp(_gated_gelu_forward, _gated_gelu_backward)

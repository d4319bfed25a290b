"""The backward passes written out in kernels.py, against JAX's own derivative of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.t5.kernels import MASKED, attend, gated_gelu, matmul

B, H, Q, K, D = 3, 2, 5, 7, 4
KEYS = jax.random.split(jax.random.key(0), 6)


def draw(number, *shape):
    return jax.random.normal(KEYS[number], shape)


def compare(ours, definition, arguments, within=1e-5):
    """Values and the gradient of every argument, within a share of the largest entry."""
    found, pull_found = jax.vjp(ours, *arguments)
    wanted, pull_wanted = jax.vjp(definition, *arguments)
    gradient = jax.random.normal(jax.random.key(9), wanted.shape).astype(wanted.dtype)
    pairs = zip((found, *pull_found(gradient)), (wanted, *pull_wanted(gradient)), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=within * np.abs(other).max())


MASK = np.ones((B, 1, 1, K), bool)
MASK[0, ..., 4:] = MASK[1, ..., :2] = False


@pytest.mark.parametrize("mask", [None, MASK, np.tri(Q, K, dtype=bool)[None, None]], ids=["none", "padding", "causal"])
@pytest.mark.parametrize("biased", [True, False])
def test_attend_is_its_definition(mask, biased):
    def definition(query, key, value, bias=None):
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) + (0 if bias is None else bias)
        scores = scores if mask is None else jnp.where(mask, scores, MASKED)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), value)

    mask_array = None if mask is None else jnp.asarray(mask)
    arrays = [draw(0, B, H, Q, D), draw(1, B, H, K, D), draw(2, B, H, K, D), *[draw(3, 1, H, Q, K)] * biased]
    compare(lambda q, k, v, bias=None: attend(q, k, v, bias, mask_array), definition, arrays)


def test_a_row_without_keys_has_no_nan():
    query, keys = draw(0, 1, H, Q, D), draw(1, 1, H, K, D)
    mask = jnp.zeros((1, 1, 1, K), bool)
    value, pull = jax.vjp(lambda q, k: attend(q, k, keys, None, mask), query, keys)
    np.testing.assert_allclose(value, jnp.broadcast_to(keys.mean(2, keepdims=True), value.shape), rtol=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in pull(value))


def test_gated_gelu_is_its_definition():
    arrays = [3 * draw(0, 4, 6, 8), draw(1, 4, 6, 8)]
    compare(gated_gelu, lambda gate, linear: jax.nn.gelu(gate) * linear, arrays)
    rounded = [array.astype(jnp.bfloat16) for array in arrays]
    found = jax.grad(lambda gate, linear: gated_gelu(gate, linear).astype(jnp.float32).sum(), argnums=(0, 1))(*rounded)
    assert [gradient.dtype for gradient in found] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_product_of_bfloat16_is_summed_in_float32(dtype):
    x, kernel = draw(0, 2, 3, 512).astype(jnp.bfloat16), draw(1, 512, 8).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    found = matmul(x, kernel, dtype)
    assert found.dtype == dtype
    # To the last bit but one: a sum in bfloat16 would be off by several per cent.
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-18
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rounding, atol=rounding * np.abs(exact).max())

    def definition(x, kernel):
        return jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32)).astype(dtype)

    # The gradient that comes in is rounded to bfloat16 as the operands are.
    compare(lambda x, kernel: matmul(x, kernel, dtype), definition, [x, kernel], within=2.0**-7)


def test_a_product_of_float32_is_its_definition():
    compare(lambda x, kernel: matmul(x, kernel, jnp.float32), jnp.dot, [draw(0, 2, 3, 32), draw(1, 32, 8)])


@pytest.mark.parametrize("width", [4, 64], ids=["narrower", "wider"])
def test_the_gradient_of_a_kernel_copies_no_operand(width):
    """A transposed copy of the gradient took a fifth of a step of model tuning."""

    def of_kernel(x, kernel, gradient):
        return jax.vjp(lambda kernel: matmul(x, kernel, jnp.float32), kernel)[1](gradient)

    arrays = draw(0, 4, 8, 16), draw(1, 16, width), draw(2, 4, 8, width)
    program = jax.jit(of_kernel).lower(*arrays).compile().as_text()
    assert " dot(" in program
    assert " copy(" not in program and " transpose(" not in program

"""Draws the initial parameters of linear layers, for methods that train a network of their own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def draw_linear(
    key: jax.Array, inputs: int, outputs: int
) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]]:
    """Returns weights and a bias, drawn as by torch.nn.Linear: uniform from -inputs ** -0.5 to inputs ** -0.5."""
    of_weights, of_bias = jax.random.split(key)
    bound = inputs**-0.5
    weights = jax.random.uniform(of_weights, (inputs, outputs), jnp.float32, -bound, bound)
    return weights, jax.random.uniform(of_bias, (outputs,), jnp.float32, -bound, bound)

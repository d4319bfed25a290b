"""Linear layers of a method's own network."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def draw_linear(
    key: jax.Array, inputs: int, outputs: int
) -> tuple[Float[Array, "inputs outputs"], Float[Array, " outputs"]]:
    """Returns weights and a bias, drawn as torch.nn.Linear draws them: uniform within inputs ** -0.5 of 0."""
    of_weights, of_bias = jax.random.split(key)
    bound = inputs**-0.5
    weights = jax.random.uniform(of_weights, (inputs, outputs), jnp.float32, -bound, bound)
    return weights, jax.random.uniform(of_bias, (outputs,), jnp.float32, -bound, bound)

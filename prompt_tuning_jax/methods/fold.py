"""Compiles the function from trained parameters to the injection that is evaluated, saved and served."""

from collections.abc import Callable
from typing import Any

import jax

from prompt_tuning_jax.methods.method import Injection, Method, Params


def make_fold(
    method: Method, trained: Any, frozen: Any, jit: Callable[..., Any] = jax.jit
) -> Callable[[Params, Params], Injection]:
    """Returns the compiled `method.apply`, which does not copy parameters that the method returns unchanged.

    Args:
      trained, frozen: the parameters by name, or their shapes.
      jit: `jax.jit`, or `Partitioner.jit` on a mesh.
    """
    closed, shape = jax.make_jaxpr(method.apply, return_shape=True)(trained, frozen)
    out_tree = jax.tree.structure(shape)
    input_index = {variable: index for index, variable in enumerate(closed.jaxpr.invars)}
    # Literals are constants of the method: they are no inputs, and are computed with the rest.
    input_indices = [input_index.get(out) if not hasattr(out, "val") else None for out in closed.jaxpr.outvars]
    if all(index is not None for index in input_indices):
        compute: Callable[..., list] = lambda *_: []  # noqa: E731
    else:

        def compute_changed(trained: Params, frozen: Params) -> list[jax.Array]:
            leaves = jax.tree.leaves(method.apply(trained, frozen))
            return [leaf for leaf, index in zip(leaves, input_indices, strict=True) if index is None]

        compute = jit(compute_changed)

    def fold(trained: Params, frozen: Params) -> Injection:
        inputs, computed = jax.tree.leaves((trained, frozen)), iter(compute(trained, frozen))
        leaves = [next(computed) if index is None else inputs[index] for index in input_indices]
        return jax.tree.unflatten(out_tree, leaves)

    return fold

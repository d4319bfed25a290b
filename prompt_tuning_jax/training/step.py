"""One update of the trainable parameters: the same for every method.

Parameters are flat: `{"encoder/layers_0/mlp/wi_0/kernel": array}`. The trainable ones are donated, the frozen ones are
an argument that is only read. What the model runs with is the method's `Injection`: the loss is differentiated with
respect to the injection, and the method's own derivative takes the gradient back to what is trained.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.methods.method import Injection, Method, Params, merge
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.t5.log_likelihood import shift_right
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.loss import LossSums, cross_entropy

# By default XLA's CPU library draws what stands around a product into it, and the product then runs far below its rate.
CPU_COMPILER = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
CPU_POSITIONS = 1024  # of the encoder, in a micro-batch on a CPU: of 456 to 7,296 tried on T5 1.1 small none is faster


class TrainState(NamedTuple):
    """All that a run saves. The step is also the position in the data: batch n is a function of seed and n.

    Attributes:
      step: updates made.
      trainable: the parameters that are trained, float32.
      opt_state: the optimiser's.
      key: of the run; each step's dropout key is folded from it.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: optax.OptState
    key: UInt32[Array, "2"]


class StepMetrics(NamedTuple):
    """What one step reports; still on the device."""

    sums: LossSums
    gradient_norm: Float[Array, ""]


def dropout_key(key: UInt32[Array, "2"], step: Int[Array, ""]) -> UInt32[Array, "2"]:
    """Returns the key of a step's dropout, of the run's key: `TrainState.key`."""
    return jax.random.fold_in(key, step)


def batch_loss(
    model: Transformer,
    injection: Injection,
    frozen: Params,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B U"],
    dropout_key: jax.Array | None = None,
    z_loss: float = 1e-4,
    prompt_mask: Bool[Array, "B P"] | None = None,
    row_numbers: Int[Array, " B"] | None = None,
) -> LossSums:
    """Returns the loss of a batch, with dropout if a key is given; masks and numbers as of `Transformer.encode`."""
    logits = model.apply(
        {"params": merge(injection.parameters, frozen)},
        inputs,
        shift_right(targets, model.config.decoder_start_token_id),
        targets,
        enable_dropout=dropout_key is not None,
        **injection.prompts,
        prompt_mask=prompt_mask,
        row_numbers=row_numbers,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return cross_entropy(logits, targets, model.config.pad_token_id, z_loss)


def micro_batch(
    shape: tuple[int, ...], prompt_length: int, num_microbatches: int | None = None, batch_shards: int = 1
) -> int:
    """How many rows of a batch pass through the model at once.

    Args:
      shape: of the batch's inputs, [B, T].
      num_microbatches: that the batch is divided into. None: on a CPU so many that a layer's activations stay in its
        caches, elsewhere one.
      batch_shards: parts of a batch that pass through their own devices side by side.
    """
    batch, length = shape
    if num_microbatches is not None:
        return batch // num_microbatches
    if jax.default_backend() != "cpu":
        return batch
    most = batch_shards * max(1, CPU_POSITIONS // (prompt_length + length))
    return max(
        rows for rows in range(batch_shards, batch + 1) if batch % rows == rows % batch_shards == 0 and rows <= most
    )


def summed_gradients(
    loss_fn: Callable[..., tuple[jax.Array, LossSums]],
    injection: Any,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B U"],
    rows: int,
    tasks: Int[Array, " B"] | None = None,
) -> tuple[Any, LossSums]:
    """Returns the gradient of `loss_fn(injection, inputs, targets, row_numbers) -> (loss, sums)` and the sums.

    Both are over all rows of the batch.

    Args:
      rows: how many pass through the model at once; a divisor of B.
      tasks: of each row, see `Injection.of_rows`: the last argument of `loss_fn`, if they are given.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    columns = (inputs, targets, jnp.arange(len(inputs)), *(() if tasks is None else (tasks,)))
    if rows == len(inputs):
        return gradient(injection, *columns)

    def add(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(injection, *part)), None

    # Micro-batch n takes every k-th row, so that it stays evenly sharded over the batch axis.
    parts = tuple(x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1) for x in columns)
    shapes = jax.eval_shape(gradient, injection, *(part[0] for part in parts))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, nothing, parts)[0]


def compile_step(
    step: Callable[..., Any], jit: Callable[..., Any] = jax.jit, out_shardings: Any = None
) -> Callable[..., Any]:
    """Returns `jax.jit` of a step whose first argument is donated. XLA_FLAGS wins over the settings made here."""
    options = {}
    if jax.default_backend() == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        options = {name: value for name, value in CPU_COMPILER.items() if name not in flags}
    return jit(step, donate_argnums=0, compiler_options=options, out_shardings=out_shardings)


def inject(method: Method, trained: Params, frozen: Params) -> tuple[Injection, Callable[[Injection], Params]]:
    """Returns what the model runs with, and what takes a gradient of it back to what is trained.

    The method's own computations are kept apart from the model's and the optimiser's: fused with these, they would be
    rounded in one program otherwise than in another, and runs that share a program otherwise than alone.
    """
    injection, pull_back = jax.vjp(lambda trained: method.apply(trained, frozen), trained)

    def gradients(of_injection: Injection) -> Params:
        (of_trained,) = pull_back(jax.lax.optimization_barrier(of_injection))
        return jax.lax.optimization_barrier(of_trained)

    return jax.lax.optimization_barrier(injection), gradients


def make_train_step(
    model: Transformer,
    method: Method,
    optimizer: optax.GradientTransformation,
    z_loss: float = 1e-4,
    num_microbatches: int | None = None,
    partitioner: Partitioner | OneDevice = ONE_DEVICE,
    state_shardings: TrainState | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the compiled `(state, frozen, batch) -> (state, metrics)`. The state passed in is donated.

    Args:
      num_microbatches: see `micro_batch`.
      partitioner: of the mesh that all of it lies on.
      state_shardings: of the state on that mesh.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = dropout_key(state.key, state.step)
        injection, pull_back = inject(method, state.trainable, frozen)

        def loss_fn(
            injection: Injection,
            inputs: Int[Array, "b T"],
            targets: Int[Array, "b U"],
            numbers: Int[Array, " b"],
            tasks: Int[Array, " b"] | None = None,
        ) -> tuple[jax.Array, LossSums]:
            own = injection.of_rows(tasks)
            sums = batch_loss(model, own, frozen, inputs, targets, key, z_loss, row_numbers=numbers)
            return sums.loss, sums

        rows = micro_batch(batch.inputs.shape, injection.length, num_microbatches, partitioner.batch_shards)
        of_injection, sums = summed_gradients(loss_fn, injection, batch.inputs, batch.targets, rows, batch.tasks)
        gradients = pull_back(of_injection)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (
            TrainState(state.step + 1, trainable, opt_state, state.key),
            StepMetrics(sums, optax.tree.norm(gradients)),
        )

    return compile_step(train_step, partitioner.jit, (state_shardings, partitioner.replicated))

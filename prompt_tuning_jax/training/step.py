"""Computes one update of the trainable parameters, in the same way for every method.

Parameters are in a flat dictionary by path: `{"encoder/layers_0/mlp/wi_0/kernel": array}`. The trainable parameters are
donated; the frozen ones are an argument that is only read. The loss is differentiated with respect to the method's
`Injection`, and the method's vector-Jacobian product turns that gradient into the gradient of the trained parameters.
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

# By default, XLA's CPU library fuses a matmul with the operations around it, which makes the matmul much slower.
CPU_COMPILER = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
# Encoder positions per micro-batch on a CPU. From 456 to 7,296 were tried with T5 1.1 small; none was faster.
CPU_POSITIONS = 1024


class TrainState(NamedTuple):
    """Holds everything that a checkpoint saves of the training state.

    Attributes:
      step: number of updates so far. It is also the position in the data, because batch n is a function of seed and n.
      trainable: the trained parameters, float32.
      opt_state: the optimiser's state.
      key: the run's key; the dropout key of each step is folded from it.
    """

    step: Int[Array, ""]
    trainable: Params
    opt_state: optax.OptState
    key: UInt32[Array, "2"]


class StepMetrics(NamedTuple):
    """Holds what one step reports, on the device."""

    sums: LossSums
    gradient_norm: Float[Array, ""]


def dropout_key(key: UInt32[Array, "2"], step: Int[Array, ""]) -> UInt32[Array, "2"]:
    """Returns the dropout key of a step, folded from the run's key, `TrainState.key`."""
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
    """Returns the loss of a batch.

    Args:
      dropout_key: None for no dropout.
      z_loss: see `loss.cross_entropy`.
      prompt_mask, row_numbers: see `Transformer.encode`.
    """
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


def micro_batch_size(
    shape: tuple[int, ...], prompt_length: int, num_microbatches: int | None = None, batch_shards: int = 1
) -> int:
    """Returns the number of rows per micro-batch: the rows that pass through the model at once.

    Args:
      shape: shape of the batch's inputs, (B, T).
      prompt_length: number of prompt positions in front of the inputs, P.
      num_microbatches: number of micro-batches per batch. None for one on an accelerator, and on a CPU for as many as
        keep a layer's activations in the caches.
      batch_shards: number of parts that the mesh shards a batch into; the rows are a multiple of it.
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
    """Returns the gradient of a loss with respect to an injection, and the loss sums, both summed over the batch.

    Args:
      loss_fn: `(injection, inputs, targets, row_numbers) -> (loss, sums)` of a micro-batch. It gets `tasks` as a last
        argument if they are given.
      injection: what the model runs with.
      rows: number of rows per micro-batch; a divisor of B.
      tasks: the index of each row's task, see `Injection.of_rows`.
    """
    # Jitted, so that `eval_shape` and `scan` below share one tracing of the model. Inlined, so that the step's program
    # has no separate function for it.
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True), inline=True)
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
    """Returns the jitted step, with its first argument donated and, on a CPU, with the options of `CPU_COMPILER`.

    An option that the environment variable XLA_FLAGS names is left to that variable.

    Args:
      jit: `jax.jit`, or `Partitioner.jit` on a mesh.
      out_shardings: shardings of the step's results.
    """
    options = {}
    if jax.default_backend() == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        options = {name: value for name, value in CPU_COMPILER.items() if name not in flags}
    return jit(step, donate_argnums=0, compiler_options=options, out_shardings=out_shardings)


def inject(method: Method, trained: Params, frozen: Params) -> tuple[Injection, Callable[[Injection], Params]]:
    """Returns the method's injection, and a function from the injection's gradient to the trained parameters' gradient.

    Optimization barriers keep XLA from fusing the method's operations with those of the model and the optimiser. Fusion
    would round differently in each program, so that a run in a shared program would differ from the same run alone.
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
    """Returns the jitted training step, `(state, frozen, batch) -> (state, metrics)`. The state passed in is donated.

    Args:
      z_loss: see `loss.cross_entropy`.
      num_microbatches: see `micro_batch_size`.
      partitioner: the partitioner of the mesh on which the arguments are placed.
      state_shardings: the shardings of the state on that mesh; None on one device.
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

        rows = micro_batch_size(batch.inputs.shape, injection.length, num_microbatches, partitioner.batch_shards)
        of_injection, sums = summed_gradients(loss_fn, injection, batch.inputs, batch.targets, rows, batch.tasks)
        gradients = pull_back(of_injection)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (
            TrainState(state.step + 1, trainable, opt_state, state.key),
            StepMetrics(sums, optax.tree.norm(gradients)),
        )

    return compile_step(train_step, partitioner.jit, (state_shardings, partitioner.replicated))

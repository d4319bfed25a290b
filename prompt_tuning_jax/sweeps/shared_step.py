"""Compiles one training step for many runs, which share one frozen base model.

Each run has its own injection, batch and key. Up to `at_once` runs are vmapped into one forward and backward pass, and
so share each matmul with the base model's weights. Each run's own method and optimiser then update its own parameters.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, UInt32

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import expected_shapes
from prompt_tuning_jax.methods.method import Injection, Method, Params
from prompt_tuning_jax.methods.shapes import start_shapes
from prompt_tuning_jax.t5.adapters import PREFIX_KEY
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.loop import States, Step
from prompt_tuning_jax.training.loss import LossSums
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.step import (
    StepMetrics,
    TrainState,
    batch_loss,
    compile_step,
    dropout_key,
    inject,
    micro_batch_size,
    summed_gradients,
)


def program_key(config: TrainConfig) -> Hashable | None:
    """Returns a key that is equal for runs that can share one executable, or None if this run cannot share one.

    Runs with equal keys may differ in seed, optimiser, task, split, input length, number of steps and periods. They
    may also differ in the method if their injections have the same fields: for example, all methods that give one
    prompt can share an executable. Their prompt lengths may differ if dropout is 0.
    """
    if (
        not (config.initial_checkpoint_path or config.model)
        or not config.train_dataset.use_cached
        or config.mesh is not None
        or config.num_partitions is not None
    ):
        return None
    base = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(config.size).items()}
    trained, frozen = start_shapes(config.method, config.size, base)
    injection = jax.eval_shape(config.method.apply, trained, frozen)
    return (
        config.initial_checkpoint_path,
        id(config.model),
        config.resolved_base_dtype,
        config.vocabulary,
        config.size,
        config.z_loss,
        config.train_dataset.batch_size,
        config.num_microbatches,
        injection.prompt is None,
        injection.layer_prompts is None,
        tuple(sorted(injection.task_prompts or ())),
        tuple(sorted((path, leaf.shape) for path, leaf in injection.parameters.items())),
        tuple(sorted(path for path in trained if path in base)),
        # With dropout, `shared_step` needs equal lengths. An encoder prefix needs them too: padding in front of a
        # shorter prompt would separate the prefix from the prompt.
        injection.length if config.size.dropout_rate or f"encoder/{PREFIX_KEY}" in injection.parameters else None,
    )


def shared_step(
    model: Transformer,
    methods: Sequence[Method],
    optimizers: Sequence[optax.GradientTransformation],
    lengths: Sequence[int],
    at_once: int,
    z_loss: float = 1e-4,
    num_microbatches: int | None = None,
) -> Callable[..., tuple[States, tuple[StepMetrics, ...]]]:
    """Returns the compiled `(states, frozen, inputs [R, B, T], targets [R, B, U], tasks) -> (states, metrics)`.

    The states are donated. Shorter prompts are padded at the front with masked positions. Because T5's positions are
    relative, this equals the shorter prompt alone. Padding moves a prompt's positions, for which dropout would draw
    other bits, so with dropout all lengths must be equal.

    Args:
      methods, optimizers: one per run.
      lengths: the number of positions in front of the inputs, per run.
      at_once: the number of runs that are vmapped into one pass. With 1, and if no run is padded, each run's results
        are bit-identical to those of the run alone.
      num_microbatches: the number of micro-batches in each run's batch; see `training.step.micro_batch_size`.
    """
    longest = max(lengths)
    masks = jnp.asarray([np.arange(longest) >= longest - length for length in lengths])
    uneven = min(lengths) < longest
    if at_once > 1 and model.config.attention == "cudnn":  # its kernel cannot be vmapped
        model = model.clone(config=dataclasses.replace(model.config, attention="products"))

    def gradient(
        frozen: Params,
        injection: Injection,
        state_key: UInt32[Array, "2"],
        step: Int[Array, ""],
        mask: Bool[Array, " P"],
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B U"],
        tasks: Int[Array, " B"] | None,
    ) -> tuple[Injection, LossSums]:
        def loss(
            injection: Injection,
            inputs: Int[Array, "b T"],
            targets: Int[Array, "b U"],
            numbers: Int[Array, " b"],
            tasks: Int[Array, " b"] | None = None,
        ) -> tuple[jax.Array, LossSums]:
            prompt_mask = jnp.broadcast_to(mask, (len(inputs), longest)) if uneven else None
            own = injection.of_rows(tasks)
            sums = batch_loss(model, own, frozen, inputs, targets, key, z_loss, prompt_mask, numbers)
            return sums.loss, sums

        key = dropout_key(state_key, step)
        rows = micro_batch_size(inputs.shape, longest, num_microbatches)
        # The barriers keep XLA from fusing this pass with the slicing of the stack, so that each run's gradients are
        # rounded as in that run's own executable.
        injection = jax.lax.optimization_barrier(injection)
        return jax.lax.optimization_barrier(summed_gradients(loss, injection, inputs, targets, rows, tasks))

    def step(
        states: States,
        frozen: Params,
        inputs: Int[Array, "R B T"],
        targets: Int[Array, "R B U"],
        tasks: Int[Array, "R B"] | None = None,
    ) -> tuple[States, tuple[StepMetrics, ...]]:
        injections, pull_backs = [], []
        for state, method in zip(states, methods, strict=True):
            injection, pull_back = inject(method, state.trainable, frozen)
            injections.append(_padded(injection, longest))
            pull_backs.append(pull_back)
        stacked = jax.tree.map(lambda *each: jnp.stack(each), *injections)
        keys, steps = (jnp.stack([getattr(state, name) for state in states]) for name in ("key", "step"))
        each = (stacked, keys, steps, masks, inputs, targets, tasks)
        if at_once == 1:
            gradients, sums = jax.lax.map(lambda own: gradient(frozen, *own), each)
        else:
            gradients, sums = jax.lax.map(lambda own: gradient(frozen, *own), each, batch_size=at_once)
        new, metrics = [], []
        for run, (state, optimizer, pull_back) in enumerate(zip(states, optimizers, pull_backs, strict=True)):
            own = pull_back(_unpadded(jax.tree.map(lambda x, run=run: x[run], gradients), longest - lengths[run]))
            updates, opt_state = optimizer.update(own, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            new.append(TrainState(state.step + 1, trainable, opt_state, state.key))
            metrics.append(StepMetrics(jax.tree.map(lambda x, run=run: x[run], sums), optax.tree.norm(own)))
        return tuple(new), tuple(metrics)

    return compile_step(step)


def _padded(injection: Injection, longest: int) -> Injection:
    """Returns the injection with its prompts padded with zeros at the front to `longest` positions."""

    def pad(prompt: jax.Array) -> jax.Array:
        return jnp.pad(prompt, [(0, 0)] * (prompt.ndim - 2) + [(longest - prompt.shape[-2], 0), (0, 0)])

    return _map_prompts(pad, injection)


def _unpadded(injection: Injection, before: int) -> Injection:
    """Returns the injection without the first `before` positions of its prompts."""
    return _map_prompts(lambda prompt: prompt[..., before:, :], injection)


def _map_prompts(function: Callable[[jax.Array], jax.Array], injection: Injection) -> Injection:
    prompts = (injection.prompt, injection.layer_prompts, injection.task_prompts)
    prompt, layer_prompts, task_prompts = jax.tree.map(function, prompts)
    return injection._replace(prompt=prompt, layer_prompts=layer_prompts, task_prompts=task_prompts)


def program_of(runs: Sequence[Run], at_once: int) -> Step:
    """Returns the joint step of these runs in the form that the training loop calls."""
    step = step_of(runs, at_once)

    def together(states: States, frozen: Params, batches: Sequence[Batch]) -> tuple[States, Sequence[StepMetrics]]:
        return step(states, frozen, *stacked(batches, runs[0].size.pad_token_id))

    return together


def step_of(runs: Sequence[Run], at_once: int) -> Callable[..., tuple[States, tuple[StepMetrics, ...]]]:
    """Returns the compiled `shared_step` of these runs."""
    methods, optimizers = ([getattr(run.config, name) for run in runs] for name in ("method", "optimizer"))
    lengths, first = [run.prompt_length for run in runs], runs[0].config
    model = Transformer(runs[0].size)
    return shared_step(model, methods, optimizers, lengths, at_once, first.z_loss, first.num_microbatches)


def stacked(
    batches: Sequence[Batch], pad: int
) -> tuple[Int[np.ndarray, "R B T"], Int[np.ndarray, "R B U"], Int[np.ndarray, "R B"] | None]:
    """Returns the inputs, targets and task indices of all runs, stacked.

    Inputs and targets are padded to the widest batch, which changes no row's loss. The task indices are None if no
    batch has any.
    """

    def stack(name: str) -> Int[np.ndarray, "R B _"]:
        arrays = [getattr(batch, name) for batch in batches]
        width = max(array.shape[1] for array in arrays)
        return np.stack([np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=pad) for array in arrays])

    tasks = [batch.tasks for batch in batches if batch.tasks is not None]
    return stack("inputs"), stack("targets"), np.stack(tasks) if tasks else None

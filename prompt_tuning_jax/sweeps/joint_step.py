"""One program for many prompt-tuning runs: a prompt, a batch and a key each, one frozen base for all.

Some of the runs at a time share a forward and a backward pass, and there every product with the base's weights; each
run's own optimiser then updates its prompt.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.loss import LossSums
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.step import (
    PROMPT,
    Params,
    StepMetrics,
    TrainState,
    batch_loss,
    compile_step,
    merge,
    micro_batch,
    summed_gradients,
)

PROMPT_ONLY = ["encoder/prompt/.*"]

States = tuple[TrainState, ...]


def joint_key(config: TrainConfig) -> Hashable | None:
    """Runs of one key can share a program. None: this run cannot share one.

    They may differ in all that a run has for itself: seed, learning rate and the rest of the optimiser, initialisation,
    prompt length, task, split, length of the inputs, TRAIN_STEPS and its periods.
    """
    if (
        list(config.trainable) != PROMPT_ONLY
        or not config.initial_checkpoint_path
        or not config.train_dataset.use_cached
        or config.mesh is not None
        or config.num_partitions is not None
    ):
        return None
    return (
        config.initial_checkpoint_path,
        config.held_dtype,
        config.vocabulary,
        config.model.config,
        config.z_loss,
        config.train_dataset.batch_size,
        config.num_microbatches,
        config.prompt_length if config.model.config.dropout_rate else None,  # see `joint_step`
    )


def joint_step(
    model: Transformer,
    optimizers: Sequence[optax.GradientTransformation],
    lengths: Sequence[int],
    at_once: int,
    z_loss: float = 1e-4,
    num_microbatches: int | None = None,
) -> Callable[..., tuple[States, tuple[StepMetrics, ...]]]:
    """The compiled `(states, frozen, inputs [R, B, T], targets [R, B, U]) -> (states, metrics)`, states given up.

    A shorter prompt stands behind masked positions, which T5's relative positions make equal to the shorter one alone.
    Dropout would draw other bits for positions so moved: with dropout all lengths must be one.

    Args:
      model: with a prompt as long as the longest.
      optimizers: of each run.
      lengths: of each run's prompt, P.
      at_once: runs that share a pass. With 1, where no run is padded, each gets the bits that it would get alone.
      num_microbatches: of each run's batch; see `training.step.micro_batch`.
    """
    longest = max(lengths)
    masks = jnp.asarray([np.arange(longest) >= longest - length for length in lengths])
    uneven = min(lengths) < longest
    if at_once > 1 and model.config.attention == "cudnn":  # whose kernel cannot be mapped over runs
        model = model.clone(config=dataclasses.replace(model.config, attention="products"))

    def gradient(
        frozen: Params,
        prompt: Float[Array, "P D"],
        state_key: UInt32[Array, "2"],
        step: Int[Array, ""],
        mask: Bool[Array, " P"],
        inputs: Int[Array, "B T"],
        targets: Int[Array, "B U"],
    ) -> tuple[Float[Array, "P D"], LossSums]:
        def loss(
            prompt: Float[Array, "P D"],
            inputs: Int[Array, "b T"],
            targets: Int[Array, "b U"],
            numbers: Int[Array, " b"],
        ) -> tuple[jax.Array, LossSums]:
            prompt_mask = jnp.broadcast_to(mask, (len(inputs), longest)) if uneven else None
            params = merge({PROMPT: prompt}, frozen)
            sums = batch_loss(model, params, inputs, targets, key, z_loss, prompt_mask, numbers)
            return sums.loss, sums

        key = jax.random.fold_in(state_key, step)
        rows = micro_batch(inputs.shape, longest, num_microbatches)
        return summed_gradients(loss, prompt, inputs, targets, rows)

    def step(
        states: States, frozen: Params, inputs: Int[Array, "R B T"], targets: Int[Array, "R B U"]
    ) -> tuple[States, tuple[StepMetrics, ...]]:
        prompts = [state.trainable[PROMPT] for state in states]
        padded = jnp.stack([jnp.pad(prompt, ((longest - len(prompt), 0), (0, 0))) for prompt in prompts])
        keys, steps = (jnp.stack([getattr(state, name) for state in states]) for name in ("key", "step"))
        each = (padded, keys, steps, masks, inputs, targets)
        if at_once == 1:
            gradients, sums = jax.lax.map(lambda own: gradient(frozen, *own), each)
        else:
            gradients, sums = jax.lax.map(lambda own: gradient(frozen, *own), each, batch_size=at_once)
        new, metrics = [], []
        for run, (state, optimizer) in enumerate(zip(states, optimizers, strict=True)):
            own = {PROMPT: gradients[run, longest - len(prompts[run]) :]}
            updates, opt_state = optimizer.update(own, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            new.append(TrainState(state.step + 1, trainable, opt_state, state.key))
            metrics.append(StepMetrics(jax.tree.map(lambda x, run=run: x[run], sums), optax.tree.norm(own)))
        return tuple(new), tuple(metrics)

    return compile_step(step)


def step_of(runs: Sequence[Run], at_once: int) -> Callable[..., tuple[States, tuple[StepMetrics, ...]]]:
    """The `joint_step` of these runs."""
    lengths = [run.config.prompt_length for run in runs]
    longest = runs[int(np.argmax(lengths))].model
    optimizers, first = [run.config.optimizer for run in runs], runs[0].config
    return joint_step(longest, optimizers, lengths, at_once, first.z_loss, first.num_microbatches)


def stacked(batches: Sequence[Batch]) -> tuple[Int[np.ndarray, "R B T"], Int[np.ndarray, "R B U"]]:
    """The runs' batches, padded to the widest: padding changes no row's loss."""

    def stack(name: str) -> Int[np.ndarray, "R B _"]:
        arrays = [getattr(batch, name) for batch in batches]
        width = max(array.shape[1] for array in arrays)
        return np.stack([np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays])

    return stack("inputs"), stack("targets")

"""One update of the trainable parameters: the same for prompt tuning, model tuning and pre-training.

Parameters are flat: `{"encoder/layers_0/mlp/wi_0/kernel": array}`. The trainable half is differentiated and donated,
the frozen half is an argument that is only read.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Bool, Float, Int, UInt32

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.scoring import shift_right
from prompt_tuning_jax.training.loss import LossSums, cross_entropy

Params = dict[str, jax.Array]

PROMPT = "encoder/prompt/prompt"  # the path of the soft prompt


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


def split_trainable(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """`(trainable, frozen)`: a parameter is trained where a pattern matches its whole path.

    Raises:
      ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in params):
            raise ValueError(f"no parameter's path matches {pattern!r}; paths are like {next(iter(params))!r}")
    chosen = {path for path in params if any(re.fullmatch(pattern, path) for pattern in patterns)}
    trainable = {path: value for path, value in params.items() if path in chosen}
    return trainable, {path: value for path, value in params.items() if path not in chosen}


def merge(trainable: Params, frozen: Params) -> dict:
    """The nested parameters that a model is applied to."""
    return unflatten_dict({**frozen, **trainable}, sep="/")


def batch_loss(
    model: Transformer,
    params: dict,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B U"],
    dropout_key: jax.Array | None = None,
    z_loss: float = 1e-4,
    prompt_mask: Bool[Array, "B P"] | None = None,
) -> LossSums:
    """The loss of a batch, with dropout where a key is given; for `prompt_mask` see `Transformer.encode`."""
    logits = model.apply(
        {"params": params},
        inputs,
        shift_right(targets),
        targets,
        enable_dropout=dropout_key is not None,
        prompt_mask=prompt_mask,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return cross_entropy(logits, targets, z_loss)


def make_train_step(
    model: Transformer, optimizer: optax.GradientTransformation, z_loss: float = 1e-4
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, StepMetrics]]:
    """The compiled `(state, frozen, batch) -> (state, metrics)`. The state passed in is given up."""

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, StepMetrics]:
        dropout_key = jax.random.fold_in(state.key, state.step)

        def loss_fn(trainable: Params) -> tuple[jax.Array, LossSums]:
            sums = batch_loss(model, merge(trainable, frozen), batch.inputs, batch.targets, dropout_key, z_loss)
            return sums.loss, sums

        (_, sums), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return (
            TrainState(state.step + 1, trainable, opt_state, state.key),
            StepMetrics(sums, optax.tree.norm(gradients)),
        )

    return jax.jit(train_step, donate_argnums=0)

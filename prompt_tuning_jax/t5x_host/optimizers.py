"""Trains only the prompt under T5X (t5x/optimizers.py): an optax optimiser for the prompt, none for the rest."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict
from t5x import optimizers  # pyright: ignore[reportMissingImports]

from prompt_tuning_jax.methods.model_tuning import matching

TRAINED, FROZEN = "trained", "frozen"
TRAINABLE = ("encoder/prompt/.*",)


class ReplicatedStateWrapper(optimizers.OptaxWrapper):
    """T5X's wrapper of optax, for an optimiser whose state is small enough to be replicated on every device.

    T5X knows the axes of only some of optax's states, and not of Adafactor's.
    """

    def derive_logical_axes(
        self, optimizer: optimizers.Optimizer, param_logical_axes: FrozenDict | dict[str, Any]
    ) -> optimizers.Optimizer:
        """Returns the axes of the parameters unchanged, and None, which means replicated, for all of the state."""
        axes = jax.tree.map(lambda _: None, optimizer.state_dict())
        return optimizer.restore_state(axes | {"target": unfreeze(param_logical_axes)})


def trained_paths(paths: Iterable[str], trainable: Sequence[str]) -> set[str]:
    """Returns the paths that some pattern matches as a whole; raises ValueError as `methods.model_tuning.matching`."""
    return matching(paths, trainable)


def prompt_only(
    optimizer: optax.GradientTransformation, trainable: Sequence[str] = TRAINABLE
) -> optimizers.OptimizerDef:
    """Returns the `optimizer_def` of `models.EncoderDecoderModel`: `optimizer` for the prompt, none for the base model.

    T5X differentiates every parameter, and has its learning rate in `Trainer.learning_rate_fn`. Here the gradients of
    frozen parameters are never read, so XLA removes them. The learning rate is that of `optimizer`; T5X's is only
    logged.

    Args:
      optimizer: an optax optimiser; `training.optimizer.adafactor` has the paper's settings.
      trainable: patterns of whole paths, see `methods.model_tuning.matching`.

    Raises:
      ValueError: a pattern matches no parameter; raised when T5X creates the optimiser's state.
    """

    def labels(params: Any) -> Any:
        trained = trained_paths(flatten_dict(params, sep="/"), trainable)

        def label(path: tuple, _: Any) -> str:
            return TRAINED if jax.tree_util.keystr(path, simple=True, separator="/") in trained else FROZEN

        return jax.tree_util.tree_map_with_path(label, params)

    return ReplicatedStateWrapper(optax.partition({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels))

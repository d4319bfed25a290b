"""Prompt-only training under T5X (t5x/optimizers.py): one optax optimiser for the prompt, none for the rest."""

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
    """T5X's wrapper of optax, for an optimiser whose state is small enough to lie whole on every device.

    T5X knows the layout of only some of optax's states, and Adafactor's is not among them.
    """

    def derive_logical_axes(
        self, optimizer: optimizers.Optimizer, param_logical_axes: FrozenDict | dict[str, Any]
    ) -> optimizers.Optimizer:
        """The parameters' axes as they are; none, which means replicated, for every array of the state."""
        axes = jax.tree.map(lambda _: None, optimizer.state_dict())
        return optimizer.restore_state(axes | {"target": unfreeze(param_logical_axes)})


def trained_paths(paths: Iterable[str], trainable: Sequence[str]) -> set[str]:
    """Returns the paths that a pattern matches as a whole, as `methods.model_tuning.matching`, and raises its error."""
    return matching(paths, trainable)


def prompt_only(
    optimizer: optax.GradientTransformation, trainable: Sequence[str] = TRAINABLE
) -> optimizers.OptimizerDef:
    """`optimizer` for the prompt and nothing for the frozen base: for `models.EncoderDecoderModel(optimizer_def=...)`.

    T5X differentiates every parameter and takes its learning rate from `Trainer.learning_rate_fn`. Here the frozen
    gradients are never read, so that XLA drops them, and the rate is `optimizer`'s own: T5X's is only logged.

    Args:
      optimizer: of optax, `training.optimizer.adafactor` for the paper's settings.
      trainable: patterns of whole paths, as of `methods.model_tuning.matching`.

    Raises:
      ValueError: when T5X makes its state, a pattern matches no parameter.
    """

    def labels(params: Any) -> Any:
        trained = trained_paths(flatten_dict(params, sep="/"), trainable)

        def label(path: tuple, _: Any) -> str:
            return TRAINED if jax.tree_util.keystr(path, simple=True, separator="/") in trained else FROZEN

        return jax.tree_util.tree_map_with_path(label, params)

    return ReplicatedStateWrapper(optax.partition({TRAINED: optimizer, FROZEN: optax.set_to_zero()}, labels))

"""Defines `OneDevice`, which replaces `Partitioner` on one device, so that no caller asks whether there is a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.t5.quantized import embedding_table


class OneDevice:
    """Has the methods of `Partitioner`, and leaves every array where it is.

    This is not a mesh of one device, whose programs would go through the SPMD partitioner without any use.
    """

    mesh = replicated = parameter_sharding = None
    batch_shards = 1
    on_batch: Callable[[], None] = staticmethod(lambda: None)

    def state_shardings(self, state: Any) -> None:
        """Returns None, for no shardings: the state is on the one device."""

    def own_rows(self, batch_size: int) -> tuple[int, int]:
        return 0, 1

    def shard_rows(self, rows: Any, batch_size: int) -> Any:
        return rows

    def replicate(self, tree: Any) -> Any:
        return tree

    def place(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        return parameters

    def gather(self, tree: Any) -> Any:
        return jax.tree.map(np.asarray, tree)

    def gather_table(self, params: Mapping[str, jax.Array]) -> jax.Array:
        return embedding_table(params)

    def jit(self, function: Callable[..., Any], out_shardings: Any = None, **options: Any) -> Callable[..., Any]:
        return jax.jit(function, **options)


ONE_DEVICE = OneDevice()

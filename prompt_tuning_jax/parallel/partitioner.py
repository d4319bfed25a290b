"""Where arrays lie on a mesh: parameters by the rules, batches by rows, all else whole on every device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.spmd import logical_axis_rules
from flax.linen.partitioning import get_axis_names
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.parallel.mesh import RULES
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import TABLE, embedding_table, output_axis, scale_path

ROWS = ("data", "fsdp")


class Partitioner:
    """The rules of `mesh.RULES`, for one model on one mesh.

    Attributes:
      mesh: with the axes data, fsdp and model. One without devices gives shardings, and nothing can be placed on it.
      replicated: whole on every device.
      rules: over what each logical axis is divided; one that the devices cannot share equally is whole.
      on_batch: called before a batch is spread.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, config: T5Config):
        self.mesh: Any = mesh
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.on_batch: Callable[[], None] = lambda: None
        self._axes = logical_axes(config)
        # A head is not divided: its features meet in every product of the attention.
        sizes = {"vocab": config.vocab_size, "mlp": config.mlp_dim, "embed": config.emb_dim}
        sizes |= {"heads": config.num_heads, "joined_kv": config.num_heads}
        self.rules = [
            (axis, over if axis not in sizes or sizes[axis] % self.mesh.shape[over] == 0 else None)
            for axis, over in RULES
        ]

    @property
    def batch_shards(self) -> int:
        """Parts that a batch is divided into."""
        return int(np.prod([self.mesh.shape[axis] for axis in ROWS]))

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Of the parameter at `path`, int8 scales included."""
        axes = self._axes.get(path, (None,) * len(shape))  # the prompt is in no base: whole
        return NamedSharding(self.mesh, PartitionSpec(*(dict(self.rules).get(axis or "") for axis in axes)))

    def batch(self, batch_size: int, ndim: int = 2) -> NamedSharding:
        """Of an array with a row for each of a batch's; whole where its rows cannot be shared equally."""
        if batch_size % self.batch_shards:
            return self.replicated
        return NamedSharding(self.mesh, PartitionSpec(ROWS, *[None] * (ndim - 1)))

    def state(self, state: Any) -> Any:
        """The shardings of a training state: what has a parameter's path and shape lies where that parameter does.

        Args:
          state: a tree of arrays or shapes, with the parameters in flat dictionaries by path.
        """

        def sharding(place: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path = str(getattr(place[-1], "key", "")) if place else ""
            whole = path not in self._axes or len(self._axes[path]) != len(leaf.shape) or leaf.shape == (1,)
            return self.replicated if whole else self.parameter(path, leaf.shape)

        return jax.tree_util.tree_map_with_path(sharding, state)

    def own_rows(self, batch_size: int) -> tuple[int, int]:
        """`(index, count)`: this process has the rows of the index-th of `count` equal, consecutive parts of a batch.

        Processes that share the devices of one part of a batch have the same index.

        Raises:
          ValueError: the devices of the mesh's batch axes cannot share the rows equally.
        """
        if batch_size % self.batch_shards:
            raise SettingError(
                Setting("batch_size"),
                f" is {batch_size}, which the {self.batch_shards} parts that the mesh divides it into cannot share "
                f"equally: set it to a multiple of {self.batch_shards}, or ",
                Setting("mesh"),
            )
        places = self.batch(batch_size, 1).addressable_devices_indices_map((batch_size,)).values()
        spans = [rows.indices(batch_size)[:2] for rows in (place[0] for place in places if place is not None)]
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        return first // (last - first), batch_size // (last - first)

    def spread(self, rows: Any, batch_size: int) -> Any:
        """A batch on the devices.

        Args:
          rows: a tree of arrays on the host: the whole batch, or this process's own rows of it.
          batch_size: rows of the whole.
        """
        self.on_batch()

        def place(array: np.ndarray) -> jax.Array:
            shape = (batch_size, *array.shape[1:])
            return jax.make_array_from_process_local_data(self.batch(batch_size, array.ndim), array, shape)

        return jax.tree.map(place, rows)

    def replicate(self, tree: Any) -> Any:
        """Arrays on the host, the same in every process, on every device."""

        def place(array: Any) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, self.replicated, lambda index: array[index])

        return jax.tree.map(place, tree)

    def place(self, parameters: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Parameters by path, each where the rules put it; what lies on the mesh already is not moved."""

        def placed(path: str, value: Any) -> jax.Array:
            sharding = self.parameter(path, value.shape)
            if isinstance(value, jax.Array) and value.sharding == sharding:
                return value
            return self.replicate(value) if sharding == self.replicated else jax.device_put(value, sharding)

        return {path: placed(path, value) for path, value in parameters.items()}

    def gather(self, tree: Any) -> Any:
        """Arrays that may lie on devices of other processes, on the host. All processes call this together."""
        return jax.tree.map(np.asarray, self.jit(lambda x: x, out_shardings=self.replicated)(tree))

    def gather_table(self, params: Mapping[str, jax.Array]) -> jax.Array:
        """The embedding table, in floats, on this process's first device."""
        of_table = {path: params[path] for path in (TABLE, scale_path(TABLE)) if path in params}
        return jnp.asarray(np.asarray(self.jit(embedding_table, out_shardings=self.replicated)(of_table)))

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """`jax.jit`, with activations held to the rules by the names that the layers give them."""
        return _OnMesh(self, jax.jit(function, **options))


class _OnMesh:
    """A jitted function that is called, and lowered, with the mesh and the rules at hand."""

    def __init__(self, partitioner: Partitioner, jitted: Any):
        self._mesh, self._rules, self._jitted = partitioner.mesh, partitioner.rules, jitted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self._mesh), logical_axis_rules(self._rules):
            return self._jitted(*args, **kwargs)

    def lower(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh), logical_axis_rules(self._rules):
            return self._jitted.lower(*args)


@functools.lru_cache
def logical_axes(config: T5Config) -> Mapping[str, tuple[str | None, ...]]:
    """The logical axes of every parameter, ("embed", "mlp"), by path; those of an int8 base's scales too."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = functools.partial(Transformer(config).init, enable_dropout=False)
    tree = get_axis_names(jax.eval_shape(init, jax.random.key(0), tokens, tokens, tokens)["params_axes"])
    axes = {path: tuple(names) for path, names in flatten_dict(tree, sep="/").items()}
    scales = {}
    for path, names in axes.items():
        axis = output_axis(path)
        if axis is not None:
            scales[scale_path(path)] = (names[axis],)
    return axes | scales

"""Places arrays on a mesh: parameters are sharded by the rules, batches by rows, and all else is replicated."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.spmd import logical_axis_rules
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.parallel.mesh import RULES
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import declared_parameters
from prompt_tuning_jax.t5.quantized import TABLE, embedding_table, output_axis, scale_path

ROWS = ("data", "fsdp")


class Partitioner:
    """Applies the rules of `mesh.RULES` to one model on one mesh.

    Attributes:
      mesh: a mesh with the axes data, fsdp and model. An abstract mesh has no devices: it gives shardings, but no array
        can be placed on it.
      replicated: the sharding of an array that is whole on every device.
      rules: the mesh axis of each logical axis; None if it is not sharded, as when its size is not a multiple of the
        mesh axis.
      on_batch: called before a batch is placed on the devices.
    """

    def __init__(self, mesh: Mesh | AbstractMesh, config: T5Config):
        self.mesh: Any = mesh
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.on_batch: Callable[[], None] = lambda: None
        self._axes = logical_axes(config)
        # A head is never sharded, because both matmuls of attention need all of its features together.
        sizes = {"vocab": config.vocab_size, "mlp": config.mlp_dim, "embed": config.emb_dim}
        sizes |= {"heads": config.num_heads, "joined_kv": config.num_heads}
        self.rules = [
            (axis, over if axis not in sizes or sizes[axis] % self.mesh.shape[over] == 0 else None)
            for axis, over in RULES
        ]

    @property
    def batch_shards(self) -> int:
        """The number of parts that a batch is sharded into."""
        return int(np.prod([self.mesh.shape[axis] for axis in ROWS]))

    def parameter_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of the parameter at `path`, int8 scales included."""
        axes = self._axes.get(path, (None,) * len(shape))  # a prompt is not in the base model: replicated
        return NamedSharding(self.mesh, PartitionSpec(*(dict(self.rules).get(axis or "") for axis in axes)))

    def batch_sharding(self, batch_size: int, ndim: int = 2) -> NamedSharding:
        """Returns the sharding of an array with a batch's rows; replicated if the rows do not divide equally."""
        if batch_size % self.batch_shards:
            return self.replicated
        return NamedSharding(self.mesh, PartitionSpec(ROWS, *[None] * (ndim - 1)))

    def state_shardings(self, state: Any) -> Any:
        """Returns the shardings of a training state: a leaf with a parameter's path is sharded like that parameter.

        Leaves of another number of dimensions or of shape (1,), as Adafactor has, are replicated.

        Args:
          state: a tree of arrays or shapes, with the parameters in flat dictionaries by path.
        """

        def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            path = str(getattr(key_path[-1], "key", "")) if key_path else ""
            replicated = path not in self._axes or len(self._axes[path]) != len(leaf.shape) or leaf.shape == (1,)
            return self.replicated if replicated else self.parameter_sharding(path, leaf.shape)

        return jax.tree_util.tree_map_with_path(sharding, state)

    def own_rows(self, batch_size: int) -> tuple[int, int]:
        """Returns `(index, count)`: this process has part `index` of the `count` equal, consecutive parts of a batch.

        Processes whose devices have the same rows get the same index.

        Raises:
          ValueError: the rows do not divide equally over the data and fsdp axes.
        """
        if batch_size % self.batch_shards:
            raise SettingError(
                Setting("batch_size"),
                f" is {batch_size}, which the {self.batch_shards} parts that the mesh divides it into cannot share "
                f"equally: set it to a multiple of {self.batch_shards}, or ",
                Setting("mesh"),
            )
        indices = self.batch_sharding(batch_size, 1).addressable_devices_indices_map((batch_size,)).values()
        spans = [rows.indices(batch_size)[:2] for rows in (index[0] for index in indices if index is not None)]
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        return first // (last - first), batch_size // (last - first)

    def shard_rows(self, rows: Any, batch_size: int) -> Any:
        """Places a batch on the devices, sharded by rows.

        Args:
          rows: a tree of arrays on the host: the whole batch, or this process's own rows of it.
          batch_size: number of rows of the whole batch.
        """
        self.on_batch()

        def shard(array: np.ndarray) -> jax.Array:
            shape = (batch_size, *array.shape[1:])
            return jax.make_array_from_process_local_data(self.batch_sharding(batch_size, array.ndim), array, shape)

        return jax.tree.map(shard, rows)

    def replicate(self, tree: Any) -> Any:
        """Places arrays on every device. They are on the host, and must be the same in every process."""

        def replicate_one(array: Any) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, self.replicated, lambda index: array[index])

        return jax.tree.map(replicate_one, tree)

    def place(self, parameters: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Places parameters by path, each sharded by the rules; one that has this sharding already is not copied."""

        def place_one(path: str, value: Any) -> jax.Array:
            sharding = self.parameter_sharding(path, value.shape)
            if isinstance(value, jax.Array) and value.sharding == sharding:
                return value
            return self.replicate(value) if sharding == self.replicated else jax.device_put(value, sharding)

        return {path: place_one(path, value) for path, value in parameters.items()}

    def gather(self, tree: Any) -> Any:
        """Returns NumPy copies of arrays that may be on other processes' devices. All processes call this together."""
        return jax.tree.map(np.asarray, self.jit(lambda x: x, out_shardings=self.replicated)(tree))

    def gather_table(self, params: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the whole embedding table in floats, on this process's first device."""
        of_table = {path: params[path] for path in (TABLE, scale_path(TABLE)) if path in params}
        return jnp.asarray(np.asarray(self.jit(embedding_table, out_shardings=self.replicated)(of_table)))

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Returns `jax.jit(function)`, in which the rules shard activations by their logical axes."""
        return _OnMesh(self, jax.jit(function, **options))


class _OnMesh:
    """Wraps a jitted function, which is called and lowered in the context of the mesh and the rules."""

    def __init__(self, partitioner: Partitioner, jitted: Any):
        self._mesh, self._rules, self._jitted = partitioner.mesh, partitioner.rules, jitted

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with jax.set_mesh(self._mesh), logical_axis_rules(self._rules):
            return self._jitted(*args, **kwargs)

    def lower(self, *args: Any) -> Any:
        with jax.set_mesh(self._mesh), logical_axis_rules(self._rules):
            return self._jitted.lower(*args)


def logical_axes(config: T5Config) -> Mapping[str, tuple[str, ...]]:
    """Returns the logical axes of every parameter by path, such as ("embed", "mlp"), including those of int8 scales."""
    axes = {path: declared.axes for path, declared in declared_parameters(config).items()}
    scales = {}
    for path, names in axes.items():
        axis = output_axis(path)
        if axis is not None:
            scales[scale_path(path)] = (names[axis],)
    return axes | scales

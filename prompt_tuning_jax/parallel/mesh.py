"""Arranges devices as a mesh of three axes, and defines which mesh axis shards each of T5X's logical axes.

data    shards the batch; every device has the whole model (data parallelism)
fsdp    shards the batch and the parameters, which are gathered when a layer needs them (fully sharded data parallelism)
model   shards the parameters and the computations with them (tensor parallelism; T5X's `num_partitions`)
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Count, KnownKeys, Sizes, check_values, integer

AXES = ("data", "fsdp", "model")
MeshSizes = Annotated[Sizes, KnownKeys(tuple((name, integer(1)) for name in AXES), all_keys=False)]

# A mesh axis can shard only one axis of an array: if the rules of two axes name it, the first rule wins. An activation
# ("batch", "length", "embed") is therefore sharded by rows, and a kernel ("embed", "mlp") by both of its axes.
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("joined_kv", "model"),
    ("embed", "fsdp"),
    ("kv", None),
    ("relpos_buckets", None),
    ("length", None),
    ("prompt", None),
    ("prompt_embed", None),
)


class MeshShape(NamedTuple):
    """Holds the number of devices along each axis."""

    data: int = 1
    fsdp: int = 1
    model: int = 1

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(AXES, self, strict=True))


def mesh_shape(mesh: MeshSizes | None, num_partitions: Count | None, devices: int) -> MeshShape:
    """Returns the shape of the mesh that the settings ask for, over all devices.

    Args:
      mesh: MESH, sizes by axis. An axis that it does not name has size 1; data, if not named, has the devices left.
      num_partitions: NUM_PARTITIONS, the size of the model axis if `mesh` does not name it.
      devices: number of devices of all processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    check_values(mesh_shape, locals())
    sizes, said = dict(mesh or {}), Setting("mesh" if mesh else "num_partitions")
    if num_partitions is not None and sizes.setdefault("model", num_partitions) != num_partitions:
        found = f" has a model axis of {sizes['model']}, "
        partitions = Setting("num_partitions")
        raise SettingError(Setting("mesh"), found, partitions, f" is {num_partitions}: set one of them")
    taken = math.prod(sizes.values())
    if devices % taken or ("data" in sizes and taken != devices):
        raise SettingError(
            said,
            f" is for {'' if 'data' in sizes else 'a multiple of '}{taken} devices and there are {devices}: set ",
            said,
            f" to sizes that multiply to {devices}",
        )
    return MeshShape(**({"data": devices // taken} | sizes))


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices, sorted by process and then by id.

    This order keeps a model axis within a host if the host has enough devices, gives each process consecutive rows of
    the batch, and shards the data over several TPU slices, whose processes are numbered slice by slice.

    Raises:
      ValueError: processes would have unequal parts of a model axis.
    """
    found = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    own = len(found) // len({device.process_index for device in found})
    if shape.model % own and own % shape.model:
        raise SettingError(
            f"a model axis of {shape.model} does not fit processes of {own} devices each: set ",
            Setting("num_partitions"),
            f" to a divisor or a multiple of {own}",
        )
    return Mesh(np.array(found).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))

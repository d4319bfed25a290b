"""Which mesh a run takes: the one that is asked for, or one by the size of the model and the memory of the devices."""

import functools
import math
from collections.abc import Callable, Mapping

import jax

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.parallel.mesh import MeshShape, make_mesh, mesh_shape
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training.memory_plan import SPARE_MEMORY, resident_bytes
from prompt_tuning_jax.training.run import TrainConfig


def partitioner_for(config: TrainConfig) -> Partitioner | OneDevice:
    """Returns the run's partitioner.

    Raises:
      ValueError: the mesh that is asked for does not fit the devices or the batch.
    """
    rows, resident = config.train_dataset.batch_size, functools.partial(resident_bytes, config)
    partitioner = partitioner_of(config.size, config.mesh, config.num_partitions, rows, resident)
    if not isinstance(partitioner, OneDevice):
        check_batch(config, partitioner)
    return partitioner


def partitioner_of(
    size: T5Config,
    mesh: Mapping[str, int] | None,
    num_partitions: int | None,
    batch_size: int,
    resident: Callable[[], tuple[int, int]],
) -> Partitioner | OneDevice:
    """Returns the partitioner of the mesh that is asked for, or of `mesh_for`.

    Args:
      mesh, num_partitions: see `parallel.mesh.mesh_shape`.
      resident: bytes, as `mesh_for` takes them; asked where the memory of a device is known.

    Raises:
      ValueError: the mesh that is asked for does not fit the devices.
    """
    devices = jax.devices()
    if mesh is not None or num_partitions is not None:
        shape = mesh_shape(mesh, num_partitions, len(devices))
    elif len(devices) > 1:
        device_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        parameters, activations = (0, 0) if device_bytes is None else resident()
        shape = mesh_for(len(devices), batch_size, device_bytes, parameters, activations)
    return ONE_DEVICE if len(devices) == 1 else Partitioner(make_mesh(shape, devices), size)


def mesh_for(devices: int, batch_size: int, device_bytes: int | None, parameters: int, activations: int) -> MeshShape:
    """The mesh where none is asked for.

    The batch is divided by as many devices as can share its rows equally, and a layer's products by what is left over.
    Parameters are whole on each device where they and its activations fit, and else divided by the least power of two
    with which they do.

    Args:
      device_bytes: the memory of a device; None where it is not known, and then all fits.
      parameters: bytes of all that is there from step to step.
      activations: bytes that a step makes of the whole batch.
    """
    rows = math.gcd(devices, batch_size)
    model, fsdp = devices // rows, 1
    if device_bytes is not None:
        room = SPARE_MEMORY * device_bytes - activations / rows
        while parameters / (model * fsdp) > room and rows % (2 * fsdp) == 0:
            fsdp *= 2
    return MeshShape(rows // fsdp, fsdp, model)


def check_batch(config: TrainConfig, partitioner: Partitioner) -> None:
    """Raises ValueError where the devices cannot share the rows of a batch, or of a micro-batch, equally."""
    partitioner.own_rows(config.train_dataset.batch_size)
    parts, shards = config.num_microbatches or 1, partitioner.batch_shards
    rows = config.train_dataset.batch_size // parts
    if rows % shards:
        raise SettingError(
            Setting("num_microbatches"),
            f" is {parts}, {rows} rows each, which the {shards} parts that the mesh divides them into cannot share "
            "equally: set it lower, or ",
            Setting("mesh"),
        )

"""Chooses a run's mesh: from the settings, or else by the size of the model and the memory of the devices."""

import functools
import math
from collections.abc import Callable, Mapping

import jax

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.parallel.mesh import MeshShape, make_mesh, mesh_shape
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import connect
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training.memory_plan import SPARE_MEMORY, resident_bytes
from prompt_tuning_jax.training.run import TrainConfig


def partitioner_for(config: TrainConfig) -> Partitioner | OneDevice:
    """Returns the run's partitioner.

    Raises:
      ValueError: the mesh does not fit the devices or the batch.
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
    """Returns the partitioner for the mesh of the settings, or, if they set none, for the mesh of `mesh_for`.

    It also connects the processes' devices on this mesh, so all processes must call it together.

    Args:
      mesh, num_partitions: see `parallel.mesh.mesh_shape`.
      batch_size: rows per batch.
      resident: returns the bytes of `(parameters, activations)` for `mesh_for`. It is called only if the settings set
        no mesh and the memory of a device is known.

    Raises:
      ValueError: the mesh of the settings does not fit the devices.
    """
    devices = jax.devices()
    if mesh is not None or num_partitions is not None:
        shape = mesh_shape(mesh, num_partitions, len(devices))
    elif len(devices) > 1:
        device_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        parameters, activations = (0, 0) if device_bytes is None else resident()
        shape = mesh_for(len(devices), batch_size, device_bytes, parameters, activations)
    if len(devices) == 1:
        return ONE_DEVICE
    device_mesh = make_mesh(shape, devices)
    connect(device_mesh)
    return Partitioner(device_mesh, size)


def mesh_for(devices: int, batch_size: int, device_bytes: int | None, parameters: int, activations: int) -> MeshShape:
    """Returns the shape of the mesh for a run whose settings set none.

    The batch is sharded over as many devices as can share its rows equally. The devices left form the model axis. The
    fsdp axis has size 1 if the parameters fit beside a device's activations. Otherwise it gets the smallest power of
    two with which they fit, or the largest possible one if they never fit.

    Args:
      devices: number of devices of all processes.
      batch_size: rows per batch.
      device_bytes: memory per device; None if it is unknown, and then fsdp is 1.
      parameters: bytes of the arrays that stay in memory between steps: parameters, their copies, optimiser state.
      activations: bytes that a step saves for its backward pass for the whole batch.
    """
    rows = math.gcd(devices, batch_size)
    model, fsdp = devices // rows, 1
    if device_bytes is not None:
        room = SPARE_MEMORY * device_bytes - activations / rows
        while parameters / (model * fsdp) > room and rows % (2 * fsdp) == 0:
            fsdp *= 2
    return MeshShape(rows // fsdp, fsdp, model)


def check_batch(config: TrainConfig, partitioner: Partitioner) -> None:
    """Raises ValueError if the rows of a batch, or of a micro-batch, do not divide equally over the devices."""
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

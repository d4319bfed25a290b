"""Which mesh a run takes: the one that is asked for, or one by the size of the model and the memory of the devices."""

import math

import jax

from prompt_tuning_jax.parallel.mesh import MeshShape, make_mesh, mesh_shape
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.training.memory_plan import resident_bytes
from prompt_tuning_jax.training.run import TrainConfig

SPARE_MEMORY = 0.9  # of a device, as in a memory plan


def partitioner_for(config: TrainConfig) -> Partitioner | None:
    """Of the mesh that the run takes; None on one device, where nothing is divided.

    Raises:
      ValueError: the mesh that is asked for does not fit the devices or the batch.
    """
    devices = jax.devices()
    if config.mesh is None and config.num_partitions is None:
        if len(devices) == 1:
            return None
        statistics = jax.local_devices()[0].memory_stats() or {}
        shape = mesh_for(config, len(devices), statistics.get("bytes_limit"))
    else:
        shape = mesh_shape(config.mesh, config.num_partitions, len(devices))
    if len(devices) == 1:
        return None
    partitioner = Partitioner(make_mesh(shape, devices), config.model.config)
    check_batch(config, partitioner)
    return partitioner


def mesh_for(config: TrainConfig, devices: int, device_bytes: int | None) -> MeshShape:
    """The mesh where none is asked for.

    The batch is divided by as many devices as can share its rows equally, and a layer's products by what is left over.
    Parameters are whole on each device where base, state and activations fit, and else divided by the least power of
    two with which they do.

    Args:
      device_bytes: the memory of a device; None where it is not known, and then all fits.
    """
    rows = math.gcd(devices, config.train_dataset.batch_size)
    model, fsdp = devices // rows, 1
    if device_bytes is not None:
        parameters, activations = resident_bytes(config)
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
        raise ValueError(
            f"NUM_MICROBATCHES is {parts}, {rows} rows each, which the {shards} parts that the mesh divides them into "
            "cannot share equally: set it lower, or MESH"
        )

"""`python on_mesh.py WHAT ...`: measures on many devices, whose number must be set before JAX starts. Prints JSON.

collectives SHAPE METHOD     the collectives of the training step of a small model on a mesh
load MODEL AXES [FLAGS]      the bytes that this process reads of a model that is loaded onto a mesh
late AXES SECONDS [FLAGS]    the sums over each axis of a mesh, to which process 1 comes late
"""

import dataclasses
import functools
import json
import sys
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import CONFIG

from experiments.scaling import collectives
from prompt_tuning_jax.array_files.stored import StoredArray
from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import fingerprint, load_base, open_model, random_base
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.method import Method
from prompt_tuning_jax.methods.per_layer_prompt import PerLayerPrompt
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
from prompt_tuning_jax.methods.residual_prompt import ResidualPrompt
from prompt_tuning_jax.methods.shapes import ShapeModel
from prompt_tuning_jax.parallel.mesh import AXES, MeshShape, make_mesh, mesh_shape
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import connect, start_processes
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.run import start_state
from prompt_tuning_jax.training.step import make_train_step

PROMPT_LENGTH, BATCH = 5, 16
METHODS = {
    "PromptTuning": PromptTuning(PROMPT_LENGTH),
    "ResidualPrompt": ResidualPrompt(PROMPT_LENGTH),
    "PerLayerPrompt": PerLayerPrompt(PROMPT_LENGTH),
    "PrefixTuning": PrefixTuning(PROMPT_LENGTH),
    "LoRA": LoRA(2),
    "IA3": IA3(),
}


def step_program(shape: MeshShape, method: Method) -> tuple[str, int]:
    """Returns the compiled training step, with dropout and one micro-batch, and the bytes of the method's injection."""
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, num_encoder_layers=2)
    partitioner, optimizer = Partitioner(make_mesh(shape), config), adafactor(0.3)
    frozen = random_base(config, 0, partitioner.parameter_sharding).params
    trained = partitioner.replicate(method.init(jax.random.key(0), ShapeModel(config, frozen)))
    start = functools.partial(start_state, optimizer=optimizer, seed=0)
    shardings = partitioner.state_shardings(jax.eval_shape(start, trained))
    state = partitioner.jit(start, out_shardings=shardings)(trained)
    step = make_train_step(Transformer(config), method, optimizer, 1e-4, 1, partitioner, shardings)
    batch = Batch(np.ones((BATCH, 32), np.int32), np.ones((BATCH, 8), np.int32), np.arange(BATCH, dtype=np.int32))
    injected = jax.tree.leaves(jax.eval_shape(method.apply, state.trainable, frozen))
    program = step.lower(state, frozen, partitioner.shard_rows(batch, BATCH)).compile().as_text()
    return program, sum(leaf.size * leaf.dtype.itemsize for leaf in injected)


def load(path: str, axes: dict[str, int]) -> dict:
    """Loads a model onto a mesh, and returns how many bytes were read, read twice, and are on the devices.

    It also returns whether a model that is loaded in another dtype is sharded in the same way.
    """
    config = open_model(path).config
    assert config is not None
    partitioner = Partitioner(make_mesh(mesh_shape(axes, None, len(jax.devices()))), config)
    reads, read = defaultdict(list), StoredArray.__getitem__

    def noted(stored: StoredArray, index: tuple[slice, ...]) -> np.ndarray:
        part = read(stored, index)
        reads[stored].append((index, part.nbytes))
        return part

    StoredArray.__getitem__ = noted
    base = load_base(path, config, None, partitioner.parameter_sharding)
    StoredArray.__getitem__ = read
    twice = 0
    for stored, parts in reads.items():
        times = np.zeros(stored.shape, np.int8)
        for index, _ in parts:
            times[index] += 1
        twice += int((times > 1).sum())
    in_bfloat16 = load_base(path, config, "bfloat16", partitioner.parameter_sharding).params
    # The bytes of each array's shards on this process's devices; replicas of a shard count once.
    own = {
        name: {str(shard.index): shard.data.nbytes for shard in value.addressable_shards}
        for name, value in base.params.items()
    }
    return {
        "read_bytes": sum(nbytes for parts in reads.values() for _, nbytes in parts),
        "numbers_read_twice": twice,
        "own_bytes": sum(sum(parts.values()) for parts in own.values()),
        "device_bytes": sum(value.addressable_shards[0].data.nbytes for value in base.params.values()),
        "cast_where_it_is": all(
            (value.dtype, value.sharding) == (jnp.bfloat16, partitioner.parameter_sharding(name, value.shape))
            for name, value in in_bfloat16.items()
        ),
        "fingerprints": [base.fingerprint, fingerprint(base.params)],
    }


def late(axes: dict[str, int], seconds: float) -> dict[str, float]:
    """Returns the sum over each axis of a mesh, in programs to which process 1 comes late by so many seconds."""
    mesh = make_mesh(mesh_shape(axes, None, len(jax.devices())))
    connect(mesh)
    if jax.process_index() == 1:
        time.sleep(seconds)

    def sum_over(axis: str) -> float:
        ones = jax.make_array_from_callback(
            mesh.devices.shape, NamedSharding(mesh, P(*AXES)), lambda _: np.ones((1, 1, 1))
        )
        program = jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=P(*AXES), out_specs=P(*AXES))
        return float(jax.jit(program)(ones).addressable_data(0).sum())

    return {axis: sum_over(axis) for axis in AXES}


if __name__ == "__main__":
    what, first, *rest = sys.argv[1:]
    if what == "collectives":
        program, injected = step_program(MeshShape(*json.loads(first)), METHODS[rest[0]])
        print(json.dumps({"injected_bytes": injected, "sent": collectives(program)}))
    else:
        start_processes(dict(flag.removeprefix("--").split("=") for flag in rest[1:]))
        found = load(first, json.loads(rest[0])) if what == "load" else late(json.loads(first), float(rest[0]))
        print(json.dumps(found))

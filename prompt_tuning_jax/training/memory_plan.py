"""What a training run needs of a device's memory, from shapes alone: no parameter is made and no base is read.

Parameters and optimiser state are exact. What a step needs besides them is what the compiler lays out for the step's
own program, which is compiled and never run. Models of many layers are not compiled whole: each layer of a stack adds
about the same bytes, so the same model's programs with two and three layers a stack give an estimate for any depth.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import check_base_dtype, expected_shapes
from prompt_tuning_jax.methods import shapes
from prompt_tuning_jax.methods.method import Injection, tasks_of
from prompt_tuning_jax.parallel.mesh import AXES, MeshShape
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import quantized
from prompt_tuning_jax.training.run import TrainConfig
from prompt_tuning_jax.training.step import TrainState, batch_loss, make_train_step, micro_batch

Shapes = Any  # a tree of jax.ShapeDtypeStruct

SPARE_MEMORY = 0.9  # of what a device has or has free: its runtime, and the pieces between buffers, take the rest
COMPILED_WHOLE = 24  # layers of both stacks; three shallow programs compile faster than one of more
# Layers of encoder and decoder, of which the first and the last are like no other.
SHALLOW = ((2, 2), (3, 2), (2, 3))
TRIES = 5  # programs that the largest batch is looked for with
LARGEST_BATCH = 8_192  # that is looked for


class Part(NamedTuple):
    """Arrays that are there from the first step to the last.

    Attributes:
      count: numbers.
      bytes: of the numbers.
      dtypes: theirs, each once.
    """

    count: int
    bytes: int
    dtypes: tuple[str, ...]


class StepMemory(NamedTuple):
    """Bytes of a step as compiled.

    Attributes:
      arguments: frozen and trainable parameters, optimiser state and batch.
      temporaries: what is made on the way, as much as there is of it at once.
      outputs: the new state and the metrics.
      aliased: outputs that take the place of arguments.
      compiled: of the configured depth; False where it is extrapolated from shallower models.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    compiled: bool

    @property
    def peak(self) -> int:
        """All that is in memory at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


class MemoryPlan(NamedTuple):
    """What a run needs, part by part.

    Attributes:
      batch_size, input_length, target_length, prompt_length: B, T, U and P; P is 0 without a prompt.
      rows: of the batch that pass through the model at once.
      frozen, trainable, optimizer: exact.
      activations: bytes that the forward pass of `rows` keeps for the backward pass, as differentiated; the compiler
        keeps less where it computes anew what is cheap.
      copies: bytes of parameters in another dtype or shape, kept likewise.
      logits: bytes of those of `rows`, [rows, U, V] in float32, part of the activations.
      step: as compiled.
    """

    batch_size: int
    input_length: int
    target_length: int
    prompt_length: int
    rows: int
    frozen: Part
    trainable: Part
    optimizer: Part
    activations: int
    copies: int
    logits: int
    step: StepMemory


class LargestBatch(NamedTuple):
    """The end of a search.

    Attributes:
      fits: the largest batch whose step is known to fit; 0 where not even the smallest does.
      step: of `fits` rows, or of the smallest batch: one row, or one a micro-batch.
      too_large: the smallest batch above it that is known not to fit; None where none is.
    """

    fits: int
    step: StepMemory
    too_large: int | None


def plan(config: TrainConfig) -> MemoryPlan:
    """The memory of a run on this machine's backend, at BATCH_SIZE and at the full TASK_FEATURE_LENGTHS.

    Raises:
      ValueError: a setting is impossible by itself.
    """
    config.check()
    batch = _batch(config, config.train_dataset.batch_size)
    (batch_size, input_length), target_length = batch.inputs.shape, batch.targets.shape[1]
    state, frozen = start_shapes(config)
    prompt_length = injection_shapes(config, state, frozen).length
    rows = micro_batch(batch.inputs.shape, prompt_length, config.num_microbatches)
    activations, copies = _kept(config, state, frozen, _batch(config, rows))
    return MemoryPlan(
        batch_size=batch_size,
        input_length=input_length,
        target_length=target_length,
        prompt_length=prompt_length,
        rows=rows,
        frozen=_part(frozen),
        trainable=_part(state.trainable),
        optimizer=_part(state.opt_state),
        activations=activations,
        copies=copies,
        logits=rows * target_length * config.size.vocab_size * 4,
        step=step_memory(config, batch_size),
    )


def start_shapes(config: TrainConfig) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """`(state, frozen)` as a run starts with them, every array as its shape and dtype.

    The base model is not opened: where BASE_DTYPE leaves the dtype to its file, it is taken to be float32, the widest.

    Raises:
      ValueError: the method does not fit the model, or trains parameters of an int8 base model.
    """
    dtype = base_dtype(config)

    def base() -> dict[str, jax.Array]:
        params = {}
        for name, shape in expected_shapes(config.size).items():
            if dtype == "int8":
                params |= quantized(name, jnp.zeros(shape))
            else:
                params[name] = jnp.zeros(shape, dtype)
        return params

    params = jax.eval_shape(base)
    trainable, frozen = shapes.start_shapes(config.method, config.size, params)
    shapes.check_not_int8(trainable, params)
    injection = jax.eval_shape(config.method.apply, trainable, frozen)
    shapes.check_injection(config.method, injection, config.size, params)

    def start(trainable: dict[str, jax.Array]) -> TrainState:
        key = jax.random.key_data(jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), trainable, config.optimizer.init(trainable), key)

    return jax.eval_shape(start, trainable), frozen


def injection_shapes(config: TrainConfig, state: TrainState, frozen: Shapes) -> Injection:
    """Returns what the model runs with, every array as its shape and dtype."""
    return jax.eval_shape(config.method.apply, state.trainable, frozen)


class DevicePart(NamedTuple):
    """Bytes on each device of a mesh.

    Attributes:
      frozen, state: of the frozen parameters, and of what is trained with its optimiser's state; exact.
      activations: about what a step keeps for its backward pass, its rows divided and its layers not.
    """

    frozen: int
    state: int
    activations: int


def device_part(config: TrainConfig, shape: MeshShape) -> DevicePart:
    """What lies on each device of a mesh; no device is needed, and nothing is compiled."""
    mesh = AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    partitioner = Partitioner(mesh, config.size)
    state, frozen = start_shapes(config)

    def bytes_of(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    of_state = jax.tree.map(bytes_of, partitioner.state(state), state)
    of_frozen = [bytes_of(partitioner.parameter(path, leaf.shape), leaf) for path, leaf in frozen.items()]
    batch = _batch(config, config.train_dataset.batch_size // (config.num_microbatches or 1))
    activations, _ = _kept(config, state, frozen, batch)
    return DevicePart(sum(of_frozen), sum(jax.tree.leaves(of_state)), activations // partitioner.batch_shards)


def resident_bytes(config: TrainConfig) -> tuple[int, int]:
    """`(parameters, activations)`: bytes of all that is there from step to step, and of what a step keeps for its
    backward pass if all rows of the batch pass at once; nothing is compiled."""
    batch = _batch(config, config.train_dataset.batch_size)
    state, frozen = start_shapes(config)
    activations, copies = _kept(config, state, frozen, batch)
    return _part(frozen).bytes + _part(state).bytes + copies, activations


def base_dtype(config: TrainConfig) -> str:
    """The dtype that the base is planned in.

    Raises:
      ValueError: BASE_DTYPE is none.
    """
    check_base_dtype(config.base_dtype)
    asked = config.held_dtype
    return asked if asked in ("bfloat16", "int8") and config.initial_checkpoint_path else "float32"


def step_memory(config: TrainConfig, batch_size: int) -> StepMemory:
    """Bytes of a step on `batch_size` rows of full length."""
    cfg = config.size
    deep = (cfg.num_encoder_layers, cfg.num_decoder_layers)
    if sum(deep) <= COMPILED_WHOLE or not _uniform(config):
        return _compile(config, batch_size)
    corner, encoder, decoder = (_compile(_with_layers(config, *layers), batch_size) for layers in SHALLOW)
    arguments, temporaries, outputs, aliased = (
        _at_depth(deep, *bytes_of) for bytes_of in zip(corner[:4], encoder[:4], decoder[:4], strict=True)
    )
    return StepMemory(arguments, temporaries, outputs, aliased, compiled=False)


def largest_batch(config: TrainConfig, usable: int | float, known: MemoryPlan) -> LargestBatch:
    """The largest batch whose step takes at most `usable` bytes, each one tried by a program of its own.

    The peak is nearly affine in the batch, so that two points tell where to try next; it is not quite, so that a batch
    counts only where its own program fits.
    """
    standing = known.frozen.bytes + known.trainable.bytes + known.optimizer.bytes
    # A batch of no rows is what stands in memory anyway.
    steps = {0: StepMemory(standing, 0, 0, 0, compiled=False), known.batch_size: known.step}

    def bracket() -> tuple[int, int | None]:
        fits = max((size for size, step in steps.items() if step.peak <= usable), default=0)
        return fits, min((size for size, step in steps.items() if size > fits and step.peak > usable), default=None)

    unit = config.num_microbatches or 1  # which divides every batch
    for _ in range(TRIES if standing <= usable else 0):
        fits, too_large = bracket()
        if fits >= LARGEST_BATCH or (too_large and too_large - fits <= max(unit, fits // 32)):
            break
        size = _next_size(steps, usable, fits, too_large, unit)
        steps[size] = step_memory(config, size)
    if not bracket()[0] and unit not in steps:
        steps[unit] = step_memory(config, unit)
    fits, too_large = bracket()
    return LargestBatch(fits, steps[fits or unit], too_large)


def _next_size(steps: dict[int, StepMemory], usable: int | float, fits: int, too_large: int | None, unit: int) -> int:
    """Where the line through two known sizes reaches `usable`: a multiple of `unit`, inside what is not known."""
    other = too_large or max(size for size in steps if size < fits)
    slope = (steps[other].peak - steps[fits].peak) / (other - fits)
    guess = fits + (usable - steps[fits].peak) / slope if slope > 0 else math.inf
    ceiling = too_large - unit if too_large else max(fits + unit, min(LARGEST_BATCH, 16 * fits))
    return int(min(max(guess, fits + unit), ceiling)) // unit * unit


def _batch(config: TrainConfig, batch_size: int) -> Batch:
    """Of the full TASK_FEATURE_LENGTHS, as its shapes.

    Raises:
      ValueError: there is no such batch.
    """
    lengths = config.train_dataset.checked_lengths()
    inputs, targets = (jax.ShapeDtypeStruct((batch_size, lengths[name]), jnp.int32) for name in ("inputs", "targets"))
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Batch(inputs, targets, ids, None if tasks_of(config.method) is None else ids)


def _compile(config: TrainConfig, batch_size: int) -> StepMemory:
    state, frozen = start_shapes(config)
    model = Transformer(config.size)
    step = make_train_step(model, config.method, config.optimizer, config.z_loss, config.num_microbatches)
    found = step.lower(state, frozen, _batch(config, batch_size)).compile().memory_analysis()
    return StepMemory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        True,
    )


def _with_layers(config: TrainConfig, encoder: int, decoder: int) -> TrainConfig:
    size = dataclasses.replace(config.size, num_encoder_layers=encoder, num_decoder_layers=decoder)
    return dataclasses.replace(config, size=size)


def _at_depth(layers: tuple[int, int], corner: int, encoder: int, decoder: int) -> int:
    """What the models of `SHALLOW` have, continued to so many layers of the encoder and the decoder."""
    (least_encoder, least_decoder), *_ = SHALLOW
    more = (layers[0] - least_encoder) * (encoder - corner) + (layers[1] - least_decoder) * (decoder - corner)
    return corner + more


def _uniform(config: TrainConfig) -> bool:
    """Whether all layers of a stack are trained, or all frozen, so that what is trained of shallow models continues."""
    cfg = config.size
    deep = (cfg.num_encoder_layers, cfg.num_decoder_layers)
    if min(deep) < 2:
        return False
    try:
        trained = [
            _part(start_shapes(changed)[0].trainable).bytes
            for changed in (*(_with_layers(config, *layers) for layers in SHALLOW), config)
        ]
    except ValueError:  # a pattern names a layer that the shallow ones do not have
        return False
    return _at_depth(deep, *trained[:3]) == trained[3]


def _part(tree: Shapes) -> Part:
    leaves = jax.tree.leaves(tree)
    return Part(
        sum(leaf.size for leaf in leaves),
        sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        tuple(sorted({leaf.dtype.name for leaf in leaves})),
    )


def _kept(config: TrainConfig, state: TrainState, frozen: Shapes, batch: Batch) -> tuple[int, int]:
    """Bytes that the forward pass keeps: those that the batch decides, and copies of parameters.

    A parameter that is kept as it is takes nothing. Constants, which are kept as well, are never laid out.
    """
    model, method = Transformer(config.size), config.method

    def forward(
        trainable: Any, frozen: Any, inputs: jax.Array, targets: jax.Array, tasks: jax.Array | None, key: jax.Array
    ) -> list[jax.Array]:
        def loss(trainable: Any) -> jax.Array:
            injection = method.apply(trainable, frozen).of_rows(tasks)
            return batch_loss(model, injection, frozen, inputs, targets, key, config.z_loss).loss

        return jax.tree.leaves(jax.vjp(loss, trainable)[1])

    of_rows = (batch.inputs, batch.targets, batch.tasks)
    program = jax.make_jaxpr(forward)(state.trainable, frozen, *of_rows, jax.random.key(0)).jaxpr
    parameters = len(jax.tree.leaves((state.trainable, frozen)))
    of_parameters, of_batch = set(program.invars[:parameters]), set(program.invars[parameters:])
    for equation in program.eqns:
        given = {variable for variable in equation.invars if isinstance(variable, Var)}
        if given & of_batch:
            of_batch.update(equation.outvars)
        elif given & of_parameters:
            of_parameters.update(equation.outvars)
    kept = {variable for variable in program.outvars if isinstance(variable, Var)} - set(program.invars)
    return _part([v.aval for v in kept & of_batch]).bytes, _part([v.aval for v in kept & of_parameters]).bytes


def free_bytes() -> int | None:
    """Free memory of the first device, or of this host where the device has none of its own; None if it is unknown."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None

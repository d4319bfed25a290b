"""Computes the device memory that a training run needs, from shapes alone: without arrays and without the base model.

The bytes of parameters and optimiser state are exact. To find what a step needs besides, its program is compiled, but
not run, and the compiler reports the sizes of its buffers. Compiling a deep model takes long. Each layer of a stack
adds about the same number of bytes, so a deep model is extrapolated from models with two and three layers per stack.
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
from prompt_tuning_jax.training.step import TrainState, batch_loss, make_train_step, micro_batch_size

Shapes = Any  # a tree of jax.ShapeDtypeStruct

SPARE_MEMORY = 0.9  # the usable part of a device's memory; the rest is for the runtime and for fragmentation
# A model with at most this number of layers in both stacks is compiled as it is. For a deeper model, compiling the
# three shallow models is faster.
COMPILED_WHOLE = 24
# Layers of (encoder, decoder). Two is the fewest, because the first and the last layer of a stack differ from the rest.
SHALLOW = ((2, 2), (3, 2), (2, 3))
TRIES = 5  # programs to compile in the search for the largest batch
LARGEST_BATCH = 8_192  # the search tries no larger batch size


class Part(NamedTuple):
    """Holds the size of a group of arrays that stay in memory from the first step to the last.

    Attributes:
      count: number of array elements.
      bytes: size of all elements.
      dtypes: the names of the dtypes, sorted, each once.
    """

    count: int
    bytes: int
    dtypes: tuple[str, ...]


class StepMemory(NamedTuple):
    """Holds the bytes that a compiled step needs, as the compiler reports them.

    Attributes:
      arguments: frozen and trainable parameters, optimiser state and batch.
      temporaries: the largest total of intermediate results that are in memory at once.
      outputs: the new state and the metrics.
      aliased: outputs that reuse the memory of donated arguments.
      compiled: whether the model was compiled with the configured depth; False if the values are extrapolated from
        shallower models.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    compiled: bool

    @property
    def peak(self) -> int:
        """The largest total in memory at once."""
        return self.arguments + self.temporaries + self.outputs - self.aliased


class MemoryPlan(NamedTuple):
    """Holds the memory that a run needs, part by part.

    Attributes:
      batch_size, input_length, target_length, prompt_length: B, T, U and P; P is 0 without a prompt.
      rows: rows of the batch that pass through the model at once; see `step.micro_batch_size`.
      frozen, trainable, optimizer: the parameters and the optimiser state; exact.
      activations: bytes that the forward pass of `rows` rows saves for the backward pass, according to JAX's
        differentiation. The compiler may save less and recompute cheap operations.
      copies: bytes of parameters in another dtype or shape, which are also saved for the backward pass.
      logits: bytes of the float32 logits [rows, U, V], which are a part of `activations`.
      step: what the compiled step needs.
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
    """Holds the result of the search for the largest batch that fits into memory.

    Attributes:
      fits: the largest batch size that is known to fit; 0 if even the smallest does not fit.
      step: the memory of a step with `fits` rows. If `fits` is 0, that of the smallest batch, which has one row, or one
        row per micro-batch.
      too_large: the smallest batch size above `fits` that is known not to fit; None if none is known.
    """

    fits: int
    step: StepMemory
    too_large: int | None


def plan(config: TrainConfig) -> MemoryPlan:
    """Returns the memory that a run needs on this machine's backend, with BATCH_SIZE rows of the full lengths.

    Raises:
      ValueError: a setting is invalid.
    """
    config.check()
    batch = _batch(config, config.train_dataset.batch_size)
    (batch_size, input_length), target_length = batch.inputs.shape, batch.targets.shape[1]
    state, frozen = start_shapes(config)
    prompt_length = injection_shapes(config, state, frozen).length
    rows = micro_batch_size(batch.inputs.shape, prompt_length, config.num_microbatches)
    activations, copies = _saved_bytes(config, state, frozen, _batch(config, rows))
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
    """Returns the shapes and dtypes of a run's start, as `(state, frozen)`.

    The base model is not opened. If BASE_DTYPE leaves the dtype to the base model's file, float32 is assumed, which is
    the widest.

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
    """Returns the method's injection, with the shape and dtype of each array in its place."""
    return jax.eval_shape(config.method.apply, state.trainable, frozen)


class DevicePart(NamedTuple):
    """Holds the bytes that each device of a mesh needs.

    Attributes:
      frozen, state: the frozen parameters, and the trainable parameters with the optimiser state; exact.
      activations: estimate of what a step saves for its backward pass. It assumes that the rows are sharded, and that
        the model axis shards nothing, so it is too high for a mesh with a model axis.
    """

    frozen: int
    state: int
    activations: int


def device_part(config: TrainConfig, shape: MeshShape) -> DevicePart:
    """Returns the bytes on each device of a mesh of this shape. It needs no device, and compiles nothing."""
    mesh = AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    partitioner = Partitioner(mesh, config.size)
    state, frozen = start_shapes(config)

    def bytes_of(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    of_state = jax.tree.map(bytes_of, partitioner.state_shardings(state), state)
    of_frozen = [bytes_of(partitioner.parameter_sharding(path, leaf.shape), leaf) for path, leaf in frozen.items()]
    batch = _batch(config, config.train_dataset.batch_size // (config.num_microbatches or 1))
    activations, _ = _saved_bytes(config, state, frozen, batch)
    return DevicePart(sum(of_frozen), sum(jax.tree.leaves(of_state)), activations // partitioner.batch_shards)


def resident_bytes(config: TrainConfig) -> tuple[int, int]:
    """Returns the bytes of `(parameters, activations)` on a single device, without compiling.

    The parameters include the optimiser state and the copies of parameters in another dtype or shape. The activations
    are what a step saves for its backward pass if all rows of the batch pass through the model at once.
    """
    batch = _batch(config, config.train_dataset.batch_size)
    state, frozen = start_shapes(config)
    activations, copies = _saved_bytes(config, state, frozen, batch)
    return _part(frozen).bytes + _part(state).bytes + copies, activations


def base_dtype(config: TrainConfig) -> str:
    """Returns the dtype that the plan assumes for the base model: "bfloat16", "int8" or "float32".

    Raises:
      ValueError: BASE_DTYPE is invalid.
    """
    check_base_dtype(config.base_dtype)
    dtype = config.resolved_base_dtype
    return dtype if dtype in ("bfloat16", "int8") and config.initial_checkpoint_path else "float32"


def step_memory(config: TrainConfig, batch_size: int) -> StepMemory:
    """Returns the memory of a step with `batch_size` rows of the full lengths, extrapolated for a deep model."""
    cfg = config.size
    deep = (cfg.num_encoder_layers, cfg.num_decoder_layers)
    if sum(deep) <= COMPILED_WHOLE or not _uniform(config):
        return _compile(config, batch_size)
    smallest, encoder, decoder = (_compile(_with_layers(config, *layers), batch_size) for layers in SHALLOW)
    arguments, temporaries, outputs, aliased = (
        _at_depth(deep, *bytes_of) for bytes_of in zip(smallest[:4], encoder[:4], decoder[:4], strict=True)
    )
    return StepMemory(arguments, temporaries, outputs, aliased, compiled=False)


def largest_batch(config: TrainConfig, usable: int | float, known: MemoryPlan) -> LargestBatch:
    """Searches for the largest batch whose step needs at most `usable` bytes.

    The peak is nearly affine in the batch size, so two known sizes predict the next size to try. Because it is not
    exactly affine, each size is accepted only after its own program was compiled.

    Args:
      known: the plan at the configured batch size, where the search starts.
    """
    resident = known.frozen.bytes + known.trainable.bytes + known.optimizer.bytes
    # A batch without rows needs only the parameters and the optimiser state.
    steps = {0: StepMemory(resident, 0, 0, 0, compiled=False), known.batch_size: known.step}

    def bracket() -> tuple[int, int | None]:
        fits = max((size for size, step in steps.items() if step.peak <= usable), default=0)
        return fits, min((size for size, step in steps.items() if size > fits and step.peak > usable), default=None)

    unit = config.num_microbatches or 1  # every batch size is a multiple of it
    for _ in range(TRIES if resident <= usable else 0):
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
    """Returns the next batch size to try: where the line through two known sizes reaches `usable` bytes.

    The result is a multiple of `unit` between `fits` and `too_large`.
    """
    other = too_large or max(size for size in steps if size < fits)
    slope = (steps[other].peak - steps[fits].peak) / (other - fits)
    guess = fits + (usable - steps[fits].peak) / slope if slope > 0 else math.inf
    ceiling = too_large - unit if too_large else max(fits + unit, min(LARGEST_BATCH, 16 * fits))
    return int(min(max(guess, fits + unit), ceiling)) // unit * unit


def _batch(config: TrainConfig, batch_size: int) -> Batch:
    """Returns the shapes and dtypes of a batch with the full TASK_FEATURE_LENGTHS.

    Raises:
      ValueError: the lengths are invalid.
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


def _at_depth(layers: tuple[int, int], smallest: int, encoder: int, decoder: int) -> int:
    """Extrapolates the bytes of the three `SHALLOW` models to `layers`, the layers of (encoder, decoder)."""
    (least_encoder, least_decoder), *_ = SHALLOW
    more = (layers[0] - least_encoder) * (encoder - smallest) + (layers[1] - least_decoder) * (decoder - smallest)
    return smallest + more


def _uniform(config: TrainConfig) -> bool:
    """Returns whether a deep model may be extrapolated from the shallow ones.

    This is so if all layers of a stack are trained alike: the trained bytes then grow by the same amount per layer.
    """
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


def _saved_bytes(config: TrainConfig, state: TrainState, frozen: Shapes, batch: Batch) -> tuple[int, int]:
    """Returns the bytes that the forward pass saves for the backward pass, as `(activations, copies)`.

    Saved arrays that depend on the batch are activations; those that depend only on parameters are copies. A parameter
    that is saved unchanged takes no further memory. Constants are not counted, because they get no buffer.
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
        arguments = {variable for variable in equation.invars if isinstance(variable, Var)}
        if arguments & of_batch:
            of_batch.update(equation.outvars)
        elif arguments & of_parameters:
            of_parameters.update(equation.outvars)
    saved = {variable for variable in program.outvars if isinstance(variable, Var)} - set(program.invars)
    return _part([v.aval for v in saved & of_batch]).bytes, _part([v.aval for v in saved & of_parameters]).bytes


def free_bytes() -> int | None:
    """Returns the bytes of free memory on the first device, or on the host if the device has no memory of its own.

    Returns None if they are unknown.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None

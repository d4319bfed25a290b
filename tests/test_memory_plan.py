"""`train --memory-plan`: what a run would need, against what arrays, programs and processes really take."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, LENGTHS, PROMPT_LENGTH, own_caches, random_params

from experiments.sizes import SIZES
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import random_base
from prompt_tuning_jax.methods.ia3 import IA3
from prompt_tuning_jax.methods.lora import LoRA
from prompt_tuning_jax.methods.method import Injection, Method, tasks_of
from prompt_tuning_jax.methods.model_tuning import ModelTuning, matching
from prompt_tuning_jax.methods.mpt import MPT
from prompt_tuning_jax.methods.per_layer_prompt import PerLayerPrompt
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.methods.residual_prompt import ResidualPrompt
from prompt_tuning_jax.methods.shapes import ShapeModel
from prompt_tuning_jax.parallel.mesh import MeshShape
from prompt_tuning_jax.prompts.initializers import RandomUniform
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training import memory_plan
from prompt_tuning_jax.training.memory_plan import device_part, largest_batch, plan, start_shapes, step_memory
from prompt_tuning_jax.training.memory_table import read_size
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.run import TrainConfig, start_state
from prompt_tuning_jax.training.step import batch_loss, make_train_step

train = importlib.import_module("prompt_tuning_jax.train")  # `prompt_tuning_jax.train` is the function
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


@pytest.fixture(autouse=True)
def caches(tiny, monkeypatch):
    """Those of the tiny runs, not the user's."""
    with own_caches(tiny, monkeypatch):
        yield


PROMPT_TUNING = PromptTuning(PROMPT_LENGTH, RandomUniform())


@dataclasses.dataclass(frozen=True)
class PromptAndLayer(Method):
    """Trains a prompt, and the first layer of the encoder with it."""

    def init(self, key, model):
        chosen = matching(model.parameters, ["encoder/layers_0/.*"])
        return PROMPT_TUNING.init(key, model) | {path: model.parameters[path] for path in chosen}

    def apply(self, trained, frozen):
        return Injection(trained[PROMPT], parameters={path: x for path, x in trained.items() if path != PROMPT})


def run_of(config=CONFIG, batch_size=8, lengths=LENGTHS, method=PROMPT_TUNING, **settings):
    """A run of a base that is nowhere."""
    dataset = DatasetConfig("demo_reviews", "train", batch_size, lengths)
    return TrainConfig(
        model_dir="no/where",
        size=config,
        method=method,
        initial_checkpoint_path="no/where",
        train_dataset=dataset,
        eval_dataset=dataset,
        optimizer=adafactor(0.3),
        train_steps=1,
        eval_period=1,
        **settings,
    )


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def of_type(method):
    return type(method).__name__


def test_parameters_and_optimiser_are_those_of_the_arrays():
    params = random_params(0)
    found = plan(run_of(dataclasses.replace(CONFIG, dropout_rate=0.1)))
    assert (found.frozen.bytes, found.frozen.count) == (nbytes(params), sum(value.size for value in params.values()))
    prompt = {PROMPT: jnp.zeros((PROMPT_LENGTH, CONFIG.emb_dim))}
    assert found.trainable.bytes == nbytes(prompt)
    assert found.optimizer.bytes == nbytes(adafactor(0.3).init(prompt))
    assert found.logits == found.rows * LENGTHS["targets"] * CONFIG.vocab_size * 4
    # They are the step's arguments, beside the batch and the run's key and step. Adafactor's two placeholders for what
    # it does not factor are none: they are not read.
    batch = 8 * sum(LENGTHS.values()) * 4
    state = found.frozen.bytes + found.trainable.bytes + found.optimizer.bytes - 2 * 4 + 8 + 4
    assert found.step.arguments == state + batch


def numbers(config):
    """How many numbers each method trains, written out; P is `PROMPT_LENGTH`, the rank and the bottleneck 2 and 6."""
    width, joined, hidden = config.emb_dim, config.num_heads * config.head_dim, config.mlp_dim
    encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
    attentions = encoder + 2 * decoder
    heads, buckets = config.num_heads, config.relative_attention_num_buckets
    tables = 2 * config.vocab_size * width + 2 * heads * buckets  # embedding and logits; both position biases
    norms = (2 * encoder + 3 * decoder + 2) * width
    layers = attentions * 4 * width * joined + (encoder + decoder) * 3 * width * hidden
    return {
        PROMPT_TUNING: PROMPT_LENGTH * width,
        ResidualPrompt(PROMPT_LENGTH, 6): PROMPT_LENGTH * width + (width * 6 + 6) + (6 * width + width) + 2 * width,
        PerLayerPrompt(PROMPT_LENGTH): encoder * PROMPT_LENGTH * width,
        MPT(("a", "b", "c"), PROMPT_LENGTH): PROMPT_LENGTH * width + 3 * (PROMPT_LENGTH + width),
        PrefixTuning(PROMPT_LENGTH): 2 * (encoder + decoder) * PROMPT_LENGTH * joined,
        LoRA(2): attentions * 2 * 2 * (width + joined),
        IA3(): attentions * 2 * joined + (encoder + decoder) * hidden,
        ModelTuning(): tables + norms + layers,
        PromptAndLayer(): PROMPT_LENGTH * width + 4 * width * joined + 3 * width * hidden + 2 * width,
    }


def numbers_of_adafactor(count, arrays):
    """A second moment for each number, as none of the tiny arrays is factored; two placeholders for each array."""
    return count + 2 * arrays + 1


DEEP = dataclasses.replace(CONFIG, num_encoder_layers=3, num_decoder_layers=2, dropout_rate=0.1)


@pytest.mark.parametrize("method", numbers(DEEP), ids=of_type)
def test_a_method_is_planned_as_its_arrays_and_its_step_are(method):
    """Every part against the arrays of a run's start, and the peak against the step that is compiled for these."""
    run = run_of(DEEP, method=method, num_microbatches=2)
    base = random_base(DEEP, 0).params
    trained = method.init(jax.random.key(0), ShapeModel(DEEP, base))
    frozen = {path: value for path, value in base.items() if path not in trained}
    state = start_state(trained, run.optimizer, seed=0)
    found = plan(run)
    count = numbers(DEEP)[method]
    assert (found.trainable.count, found.trainable.bytes) == (count, 4 * count)
    assert (found.trainable.bytes, found.trainable.dtypes) == (nbytes(state.trainable), ("float32",))
    assert found.optimizer.bytes == nbytes(state.opt_state)
    assert found.frozen.bytes == nbytes(frozen)
    assert found.frozen.count == sum(value.size for value in base.values()) - (
        sum(value.size for path, value in trained.items() if path in base)
    )
    assert found.prompt_length == (0 if isinstance(method, (PrefixTuning, LoRA, IA3, ModelTuning)) else PROMPT_LENGTH)

    step = make_train_step(Transformer(DEEP), method, run.optimizer, run.z_loss, 2)
    ids = np.zeros(8, np.int32)
    tasks = None if tasks_of(method) is None else ids
    batch = Batch(*(np.ones((8, LENGTHS[name]), np.int32) for name in ("inputs", "targets")), ids, tasks)
    program = step.lower(state, frozen, batch).compile()
    real = program.memory_analysis()
    # What is trained and its optimiser's state are written where they were. Adafactor's two placeholders for what it
    # does not factor, which none of these is large enough for, are not read.
    carried = nbytes(state) - 2 * 4 * len(trained)
    assert real.alias_size_in_bytes == carried
    assert real.argument_size_in_bytes == found.frozen.bytes + carried + nbytes((batch.inputs, batch.targets, tasks))
    assert found.step[:4] == (
        real.argument_size_in_bytes,
        real.temp_size_in_bytes,
        real.output_size_in_bytes,
        real.alias_size_in_bytes,
    )
    new, _ = program(state, frozen, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.trainable))


@pytest.mark.parametrize(
    "backend, method, expected",
    [
        ("cpu", PROMPT_TUNING, "float32"),
        ("cpu", ModelTuning(), "float32"),
        ("gpu", PROMPT_TUNING, "bfloat16"),
        ("tpu", PROMPT_TUNING, "bfloat16"),
        ("gpu", ResidualPrompt(PROMPT_LENGTH, 6), "bfloat16"),
        ("gpu", PerLayerPrompt(PROMPT_LENGTH), "bfloat16"),
        ("gpu", PrefixTuning(PROMPT_LENGTH), "bfloat16"),
        ("gpu", LoRA(2), "bfloat16"),
        ("gpu", IA3(), "bfloat16"),
        ("gpu", ModelTuning(), None),
        ("gpu", ModelTuning((".*layer_norm/scale",)), None),
        ("gpu", PromptAndLayer(), None),
    ],
)
def test_auto_is_by_the_device_and_by_what_is_trained(monkeypatch, backend, method, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = run_of(method=method)
    assert config.resolved_base_dtype == expected
    assert dataclasses.replace(config, base_dtype="int8").resolved_base_dtype == "int8"


def test_the_base_is_planned_in_its_dtype_and_what_is_trained_in_float32():
    whole = nbytes(random_params(0))
    state, frozen = start_shapes(run_of(base_dtype="bfloat16"))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in frozen.values()) == whole // 2
    assert state.trainable[PROMPT].dtype == jnp.float32
    state, frozen = start_shapes(run_of(base_dtype="bfloat16", method=ModelTuning()))
    assert not frozen
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state.trainable.values()) == whole


def test_activations_are_what_the_forward_pass_leaves_behind():
    """Its residuals as arrays: a parameter among them is that parameter, and what stands there twice counts once."""
    run = run_of()
    params = {name: jnp.asarray(value) for name, value in random_params(0).items()}
    prompt = jax.random.normal(jax.random.key(0), (PROMPT_LENGTH, CONFIG.emb_dim))
    key = jax.random.key(1)
    inputs, targets = (jax.random.randint(key, (8, LENGTHS[name]), 0, 9) for name in ("inputs", "targets"))

    @jax.jit
    def residuals(prompt, params, inputs, targets):
        def loss(prompt):
            return batch_loss(Transformer(run.size), Injection(prompt), params, inputs, targets).loss

        return jax.tree.leaves(jax.vjp(loss, prompt)[1])

    arrays = [*map(np.asarray, residuals(prompt, params, inputs, targets))]
    given = {(value.shape, value.tobytes()) for value in map(np.asarray, params.values())}
    # Numbers that are all the same are a constant, which is never laid out; a mask may be so by chance.
    laid_out = [leaf for leaf in arrays if leaf.dtype == bool or leaf.min() != leaf.max()]
    distinct = {(leaf.shape, leaf.tobytes()): leaf for leaf in laid_out}
    found = plan(run)
    assert found.rows == 8
    assert found.activations + found.copies == nbytes([distinct[key] for key in distinct.keys() - given])
    assert found.logits < found.activations


def test_deep_models_are_continued_from_shallow_ones(monkeypatch):
    deep = dataclasses.replace(CONFIG, num_encoder_layers=5, num_decoder_layers=4)
    whole = step_memory(run_of(deep), 8)
    monkeypatch.setattr(memory_plan, "COMPILED_WHOLE", 0)
    continued = step_memory(run_of(deep), 8)
    assert (whole.compiled, continued.compiled) == (True, False)
    assert (continued.arguments, continued.aliased) == (whole.arguments, whole.aliased)
    # Buffers are packed anew for each program: the temporaries of so small a model are a few dozen of them.
    assert continued.temporaries == pytest.approx(whole.temporaries, rel=0.02)


@pytest.mark.parametrize(
    "method",
    [PROMPT_TUNING, ResidualPrompt(4, 6), PerLayerPrompt(4), PrefixTuning(4), LoRA(2), IA3(), ModelTuning()],
    ids=of_type,
)
def test_methods_on_all_layers_are_continued_too(method):
    deep = dataclasses.replace(CONFIG, num_encoder_layers=5, num_decoder_layers=4)
    assert memory_plan._uniform(run_of(deep, method=method))


@pytest.mark.parametrize("pattern", ["encoder/layers_3/.*", "encoder/layers_[12]/.*"])
def test_layers_that_are_not_trained_alike_are_compiled_as_they_are(monkeypatch, pattern):
    monkeypatch.setattr(memory_plan, "COMPILED_WHOLE", 0)
    deep = dataclasses.replace(CONFIG, num_encoder_layers=4, num_decoder_layers=2)
    run = run_of(deep, method=ModelTuning((pattern,)))
    found = step_memory(run, 2)
    assert found.compiled
    assert found.aliased > sum(leaf.size * 4 for leaf in start_shapes(run)[0].trainable.values())


def test_no_parameter_of_xxl_is_made():
    state, frozen = start_shapes(run_of(SIZES["xxl"], method=PromptTuning(100)))
    assert sum(leaf.size for leaf in frozen.values()) == 11_135_332_352
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((state, frozen)))


def test_the_largest_batch_fits_and_one_more_does_not():
    run = run_of(num_microbatches=1)
    known = plan(run)
    usable = 1.5 * known.step.peak
    found = largest_batch(run, usable, known)
    assert found.fits >= 8 and found.too_large == found.fits + 1
    assert found.step == step_memory(run, found.fits)
    assert found.step.peak <= usable < step_memory(run, found.too_large).peak


def test_micro_batches_divide_the_batches_that_are_tried():
    run = run_of(num_microbatches=4)
    known = plan(run)
    assert known.rows == 2
    assert known.step.peak < step_memory(run_of(num_microbatches=1), 8).peak
    found = largest_batch(run, 1.2 * known.step.peak, known)
    assert found.fits >= 8
    assert found.too_large and found.fits % 4 == found.too_large % 4 == 0
    with pytest.raises(ValueError, match="`num_microbatches` is 3, expected a divisor of `batch_size`, 8"):
        plan(run_of(num_microbatches=3))


@pytest.mark.parametrize("text, size", [("80GB", 80e9), ("79.6GiB", 79.6 * 2**30), ("300 MB", 3e8), ("1TB", 1e12)])
def test_sizes(text, size):
    assert read_size(text) == round(size)


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """Runs the command line; returns its exit code, and what it printed to stdout and to stderr."""

    def run(*flags, **macros):
        folder = tmp_path / "run"
        files = macros.pop("files", ())
        settings = {"MODEL_DIR": str(folder), "INITIAL_CHECKPOINT_PATH": "no/where"} | macros
        arguments = tiny.arguments(*files, **settings)
        gin.clear_config()
        monkeypatch.setattr(sys, "argv", ["train", *arguments, *flags])
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = stop.code
        assert not folder.exists()
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_the_plan_and_leaves_nothing(command, monkeypatch):
    monkeypatch.setattr(memory_plan, "LARGEST_BATCH", 12)
    code, out, err = command("--memory-plan=40MB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"batch 8, inputs {LENGTHS['inputs']}, targets {LENGTHS['targets']}, prompt {PROMPT_LENGTH}"
    table = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    assert table["trainable parameters"][:3] == [str(PROMPT_LENGTH * CONFIG.emb_dim), "320", "B"]
    assert table["memory"][:2] == ["40.00", "MB"]
    assert table["peak of a step"][1:5] == ["kB", "compiled", "for", "cpu;"]
    assert table["largest batch: 12"][1:5] == ["MB", "compiled", "for", "cpu;"]


RANDOM, SHORT_PROMPT = ("prompts/random_uniform.gin",), {"PROMPT_LENGTH": PROMPT_LENGTH}


@pytest.mark.parametrize(
    "method, files, macros, numbers_of_optimizer",
    [
        # optax.adamw has two moments for each number and a count; Adafactor, see `numbers_of_adafactor`.
        (
            ResidualPrompt(PROMPT_LENGTH, 6),
            (*RANDOM, "methods/residual_prompt.gin"),
            SHORT_PROMPT | {"BOTTLENECK": 6},
            lambda count, _: 2 * count + 1,
        ),
        (PerLayerPrompt(PROMPT_LENGTH), (*RANDOM, "methods/per_layer_prompt.gin"), SHORT_PROMPT, numbers_of_adafactor),
        (
            PrefixTuning(PROMPT_LENGTH),
            ("methods/prefix_tuning.gin",),
            SHORT_PROMPT,
            lambda count, _: 2 * count + 1,
        ),
        (LoRA(2), ("methods/lora.gin",), {"RANK": 2}, lambda count, _: 2 * count + 1),
        (IA3(), ("methods/ia3.gin",), {}, numbers_of_adafactor),
        (ModelTuning(), ("runs/model_tune.gin",), {}, numbers_of_adafactor),
    ],
    ids=of_type,
)
def test_the_command_prints_the_plan_of_any_method(command, monkeypatch, method, files, macros, numbers_of_optimizer):
    monkeypatch.setattr(memory_plan, "LARGEST_BATCH", 8)
    code, out, err = command("--memory-plan=40MB", files=files, BATCH_SIZE=8, **macros)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    prompted = isinstance(method, (ResidualPrompt, PerLayerPrompt))
    shape = f"batch 8, inputs {LENGTHS['inputs']}, targets {LENGTHS['targets']}"
    assert lines[0] == shape + (f", prompt {PROMPT_LENGTH}" if prompted else "")
    table = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    trained, whole = numbers(CONFIG)[method], numbers(CONFIG)[ModelTuning()]
    frozen = 0 if isinstance(method, ModelTuning) else whole
    arrays = len(memory_plan.start_shapes(run_of(method=method))[0].trainable)
    printed = {name: int(table[name][0].replace(",", "")) for name in PARTS}
    assert printed == dict(zip(PARTS, (frozen, trained, numbers_of_optimizer(trained, arrays)), strict=True))
    assert table["peak of a step"][2:5] == ["compiled", "for", "cpu;"]
    assert "largest batch: 8" in table


PARTS = ("frozen parameters", "trainable parameters", "optimiser state")


def test_without_a_value_it_is_this_machines_memory(command, monkeypatch):
    monkeypatch.setattr(memory_plan, "LARGEST_BATCH", 16)
    code, out, _ = command("--memory-plan")
    assert code == 0
    assert "free on this host" in out
    assert out.splitlines()[-1].startswith("largest batch: 16 ")


def test_a_plan_for_another_device_says_which_of_its_settings_are_a_cpus(command, monkeypatch):
    """With the settings that it names, the frozen parameters take half the bytes."""
    monkeypatch.setattr(memory_plan, "TRIES", 0)
    code, out, err = command("--memory-plan=40MB")
    (note,) = (line for line in out.splitlines() if line.startswith("No accelerator is here"))
    assert (code, err) == (0, "")
    assert note.endswith("by itself: ACTIVATION_DTYPE='bfloat16', BASE_DTYPE='bfloat16', NUM_MICROBATCHES=1")
    settings = {"ACTIVATION_DTYPE": "bfloat16", "BASE_DTYPE": "bfloat16", "NUM_MICROBATCHES": 1}
    code, other, err = command("--memory-plan=40MB", **settings)
    assert (code, err) == (0, "") and "No accelerator" not in other
    before, after = (
        float(number) for text in (out, other) for number in re.findall(r"frozen parameters +[\d,]+ +([\d.]+) kB", text)
    )
    assert after == pytest.approx(before / 2, abs=0.01)  # two decimals are printed
    assert "No accelerator" not in command("--memory-plan")[1]


def test_a_batch_that_does_not_fit_is_told_from_a_run_that_does_not(command, monkeypatch):
    monkeypatch.setattr(memory_plan, "TRIES", 1)
    code, out, err = command("--memory-plan=1MB", BATCH_SIZE=27)
    assert (code, err) == (0, "")
    assert re.search(
        r"(?m)^BATCH_SIZE 27 does not fit: its step takes [\d.]+ MB more than the 900\.00 kB planned with$", out
    )
    code, out, err = command("--memory-plan=10kB")
    assert code == 2
    assert out.startswith("batch 8")
    assert re.fullmatch(r"error: a batch of 1 does not fit: its step takes .+, .+ more than the 9.00 kB .+\n", err)


def test_a_mesh_is_planned_without_its_devices(command):
    """Halves of what the model axis divides, and all of the norms; the prompt on every device."""
    code, out, err = command("--memory-plan=1GB", NUM_PARTITIONS=2)
    assert (code, err) == (0, "")
    assert "on each of 2 devices, data 1 x fsdp 1 x model 2" in out and "largest batch" not in out
    config, whole = run_of(num_partitions=2), plan(run_of())
    part = device_part(config, MeshShape(model=2))
    assert whole.frozen.bytes / 2 < part.frozen < 0.6 * whole.frozen.bytes
    assert part.state == whole.trainable.bytes + whole.optimizer.bytes + 3 * 4  # its key and step
    assert device_part(config, MeshShape(fsdp=2, model=2)).frozen < 0.35 * whole.frozen.bytes
    assert device_part(config, MeshShape(data=8)).activations == part.activations // 8


@pytest.mark.parametrize(
    "method",
    [ResidualPrompt(PROMPT_LENGTH, 6), PerLayerPrompt(PROMPT_LENGTH), PrefixTuning(PROMPT_LENGTH), LoRA(2), IA3()],
    ids=of_type,
)
def test_what_is_not_the_base_models_is_whole_on_each_device_of_a_mesh(method):
    whole = plan(run_of(method=method))
    part = device_part(run_of(method=method), MeshShape(fsdp=2, model=2))
    assert part.state == whole.trainable.bytes + whole.optimizer.bytes + 3 * 4  # the run's key and step
    assert part.frozen < 0.35 * whole.frozen.bytes


def test_a_mesh_on_which_it_does_not_fit(command):
    code, _, err = command("--memory-plan=10kB", MESH={"fsdp": 2})
    assert code == 2
    assert re.fullmatch(
        r"error: each device needs .+ more than the .+ planned with: set MESH with a larger fsdp or model axis.+\n", err
    )


@pytest.mark.parametrize("flag", ["80", "0GB", "0.0GB", "GB", "-1GB", "80 gigabytes", "1e3GB"])
def test_a_memory_that_is_none_is_refused(command, flag):
    code, out, err = command(f"--memory-plan={flag}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --memory-plan={flag}: no size of a memory; expected a number above 0 and its unit")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"BATCH_SIZE": 0}, "BATCH_SIZE is 0"),
        ({"PROMPT_LENGTH": 0}, "PROMPT_LENGTH is 0"),
        ({"BASE_DTYPE": "float8"}, "BASE_DTYPE is 'float8'"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 32}}, "has no key 'targets', expected 'inputs' and 'targets'"),
    ],
)
def test_settings_are_checked_as_a_run_checks_them(command, macros, message):
    code, out, err = command("--memory-plan=1GB", **macros)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


# Runs steps of nano and prints what they added to the memory in use, beside what the plan says that they add.
MEASURE = """
import ctypes, dataclasses, gc, json, re
from pathlib import Path
import jax, jax.numpy as jnp
from test_memory_plan import run_of
from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import random_base
from experiments.sizes import SIZES
from prompt_tuning_jax.training.memory_plan import plan
from prompt_tuning_jax.methods.prefix_tuning import PrefixTuning
from prompt_tuning_jax.methods.prompt_tuning import PROMPT, PromptTuning
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.step import TrainState, make_train_step

size = dataclasses.replace(SIZES["nano"], dropout_rate=0.1)
config = run_of(size, 64, {"inputs": 256, "targets": 32}, PromptTuning(20), num_microbatches=1)
step = plan(config).step
trainable, frozen = {PROMPT: jnp.ones((20, 128))}, random_base(size, 0).params
key = jax.random.key_data(jax.random.key(0))
state = TrainState(jnp.zeros((), jnp.int32), trainable, config.optimizer.init(trainable), key)
batch = Batch(jnp.ones((64, 256), jnp.int32), jnp.ones((64, 32), jnp.int32), jnp.zeros(64, jnp.int32))
train_step = make_train_step(Transformer(size), config.method, config.optimizer, config.z_loss, 1)
train_step = train_step.lower(state, frozen, batch).compile()
jax.block_until_ready((state, frozen, batch))
device = jax.local_devices()[0]
if device.platform == "cpu":  # XLA's threads allocate scratch in their first step and keep it
    state, metrics = train_step(state, frozen, batch)
    jax.block_until_ready((state, metrics))
    del metrics

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

if device.platform == "cpu":
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status("VmRSS")
else:
    before = device.memory_stats()["bytes_in_use"]
for _ in range(2):
    state, metrics = train_step(state, frozen, batch)
jax.block_until_ready(metrics)
after = status("VmHWM") if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]
print(json.dumps({"measured": after - before, "planned": step.peak - step.arguments, "compiled": step.compiled}))
"""


@pytest.mark.parametrize("platform", ["cpu", "accelerator"])
def test_a_step_takes_what_is_planned(platform, tiny):
    """Within a tenth: the process also allocates scratch for its products and threads, which no program knows of."""
    if platform == "accelerator" and not any(map(importlib.util.find_spec, ACCELERATORS)):
        pytest.skip("no accelerator")
    environment = os.environ | tiny.environment
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], os.path.dirname(__file__)])
    del environment["XLA_FLAGS"]  # the flags that compile fast take more memory than XLA's own
    if platform == "accelerator":
        del environment["JAX_PLATFORMS"]
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["compiled"]
    assert found["measured"] == pytest.approx(found["planned"], rel=0.1), found
    assert found["planned"] > 10**8, "large enough to be told from what else a process does"

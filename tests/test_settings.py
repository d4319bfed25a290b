"""Checks that settings of wrong type or range give one line: what was found, what is expected, and which setting."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gin
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from tiny import CONFIG, LENGTHS, ROOT, own_caches

import prompt_tuning_jax as pt
from prompt_tuning_jax import __main__ as commands
from prompt_tuning_jax import gin_files, sweep
from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import with_size
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.inference.limits import Limits
from prompt_tuning_jax.inference.requests import Decoding, Reader
from prompt_tuning_jax.prompts.initializers import start_prompt
from prompt_tuning_jax.settings import (
    Count,
    Counts,
    Lengths,
    Rate,
    Seed,
    Share,
    Switch,
    Text,
    Texts,
    accepts,
    check,
    check_fields,
    integer,
    keep_plain,
)
from prompt_tuning_jax.sweeps import spec
from prompt_tuning_jax.sweeps.launchers import jobset, local, slurm, xpk
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training import api, eval_run, loop, optimizer, run

TRAIN, EVAL = (importlib.import_module(f"prompt_tuning_jax.{name}").main for name in ("train", "eval"))
METHODS = sorted(f"methods/{path.name}" for path in (ROOT / "gin_configs" / "methods").glob("*.gin"))
RUNS = ["runs/prompt_tune.gin", "runs/model_tune.gin", *METHODS]


class Reached(Exception):
    """Says that all settings were accepted, when the first file of the base model would be opened."""


def reached(*args, **kwargs):
    raise Reached


@pytest.fixture(autouse=True)
def caches(tiny, monkeypatch):
    """Sets the caches to those of the tiny runs, so that the user's are not touched."""
    with own_caches(tiny, monkeypatch):
        yield


def line_of(main, arguments, folder) -> Any:
    """Returns the single line with which a command refuses its arguments; None if it accepts them.

    Checks that `folder` is not created in either case.
    """
    gin.clear_config()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["command", *arguments])
        patch.setattr(loop, "open_model", reached)
        patch.setattr(eval_run, "open_vocabulary", reached)
        try:
            main()
            line = None
        except Reached:
            line = None
        except SystemExit as stop:
            assert stop.code in (0, 2)
            line = said.getvalue().removeprefix("error: ") if stop.code else None
    assert not Path(folder).exists()
    if line is not None:
        assert line.endswith("\n") and line.count("\n") == 1 and line.strip(), line
        assert said.getvalue().startswith("error: ")
    return line and line.rstrip("\n")


@pytest.fixture
def train_line(tiny, tmp_path):
    def line(*files, bindings=(), **macros):
        arguments = tiny.arguments(*files, **{"MODEL_DIR": str(tmp_path / "run")} | macros)
        return line_of(TRAIN, [*arguments, *bindings], tmp_path / "run")

    return line


@pytest.fixture
def eval_line(tiny, tmp_path):
    def line(**macros):
        values = {
            "MIXTURE_OR_TASK_NAME": "demo_reviews",
            "TASK_FEATURE_LENGTHS": LENGTHS,
            "INITIAL_CHECKPOINT_PATH": str(tiny.base),
            "PROMPT_FILE": None,
            "MODEL_DIR": str(tmp_path / "eval"),
        } | macros
        arguments = [f"--gin.{name}={value!r}" for name, value in values.items()]
        return line_of(EVAL, [f"--gin_file={tiny.gin}", "--gin_file=runs/eval.gin", *arguments], tmp_path / "eval")

    return line


ROWS = [{"inputs": f"row {n}", "targets": ["bad", "good"][n % 2]} for n in range(4)]
FITTING = {"steps": 2, "batch_size": 2, "lengths": {"inputs": 8, "targets": 4}, "labels": ["bad", "good"]}


@pytest.fixture
def refused(model, tmp_path):
    """Returns a function that calls `pt.train` and returns its error; it checks that nothing was written."""

    def error(train=pt.train, method=None, **changed) -> SettingError:
        method = pt.PromptTuning(3) if method is None else method
        with pytest.raises(SettingError) as raised:
            train(changed.pop("model", model), method, ROWS, ROWS, **FITTING | {"folder": tmp_path / "run"} | changed)
        assert not (tmp_path / "run").exists() and "\n" not in str(raised.value)
        return raised.value

    return error


# --- each kind


@pytest.mark.parametrize(
    "annotation, right, wrong",
    [
        (Count, [1, np.int64(3), 2**31 - 1], [0, -1, True, 1.0, "1", None, np.float32(1), np.array([1]), 2**31]),
        (Count | None, [None, 1], [0, "None"]),
        (Seed, [0, 2**32 - 1, np.uint32(7)], [-1, 2**32, 0.0, False]),
        (Share, [0, 0.0, 0.999, np.float32(0.5)], [1, 1.5, -0.1, True, "0.1", float("nan")]),
        (Rate, [1e-9, 1, 1e6, lambda step: 0.1], [0, -0.3, 1e38, float("inf"), float("nan"), "abc", True, int]),
        (Text, ["", "a"], [1, None, b"a", ["a"]]),
        (Texts, [[], ["a"], ("a", "b")], ["a", [1], {"a": 1}, None]),
        (Counts, [[1, 2]], ["12", [0], [1.0], 5]),
        (Switch, [True, False], [0, 1, "True", None]),
        (Lengths, [{"inputs": 1, "targets": 2}], [{}, {"inputs": 1}, {"inputs": 1, "targets": 1}, [], "a", None]),
        (integer(2, 4, "the rooms"), [2, 4], [1, 5]),
        (int, ["anything"], []),
    ],
)
def test_a_kind_accepts_its_values_alone(annotation, right, wrong):
    assert all(accepts(value, annotation) for value in right)
    assert not any(accepts(value, annotation) for value in wrong)


@pytest.mark.parametrize(
    "value, annotation, message",
    [
        ("16", Count, "`batch_size` is '16', expected a whole number of at least 1; did you mean 16?"),
        (2.0, Count, "`batch_size` is 2.0, expected a whole number of at least 1; did you mean 2?"),
        (2.5, Count, "`batch_size` is 2.5, expected a whole number of at least 1"),
        (True, Count | None, "`batch_size` is True, expected a whole number of at least 1 or None"),
        (2**40, Count, "`batch_size` is 1099511627776, expected at most 2147483647, which int32 can hold"),
        (9, integer(1, 8, "the width"), "`batch_size` is 9, expected a whole number from 1 to 8, the width"),
        (1.5, Share, "`batch_size` is 1.5, expected a number in [0, 1)"),
        ("yes no", Texts, "`batch_size` is 'yes no', expected a list of texts; did you mean ['yes no']?"),
        (["a", 1], Texts, "`batch_size`[1] is 1, expected a text"),
        (
            {"inputs": 16.7, "targets": 8},
            Lengths,
            "`batch_size`['inputs'] is 16.7, expected a whole number of at least 1",
        ),
        (
            {"inputs": 16, "targets": 8, "target": 32},
            Lengths,
            "`batch_size` has the key 'target', expected 'inputs' and 'targets'; did you mean 'targets'?",
        ),
        ("x" * 999, Count, f"`batch_size` is '{'x' * 56}..., expected a whole number of at least 1"),
        (np.zeros((2, 2)), Share, "`batch_size` is array([[0., 0.], [0., 0.]]), expected a number in [0, 1)"),
    ],
)  # fmt: skip
def test_the_message_names_what_was_found_expected_and_meant(value, annotation, message):
    with pytest.raises(SettingError) as raised:
        check("batch_size", value, annotation)
    assert str(raised.value) == message and raised.value.setting == "batch_size"


def test_a_rate_that_is_traced_has_no_value_yet_and_a_scalar_of_jax_has():
    assert accepts(jnp.array(0.3), Rate) and not accepts(jnp.array(-0.3), Rate)
    made = optax.inject_hyperparams(optimizer.adafactor)(learning_rate=0.3)
    assert made.init({"x": jnp.ones(3)}).hyperparams["learning_rate"] == np.float32(0.3)


def test_numbers_of_numpy_become_pythons_so_that_they_can_be_written_as_json():
    made = DatasetConfig("task", "train", np.int64(4), {"inputs": 4, "targets": 4})
    check_fields(made)
    keep_plain(made)
    assert type(made.batch_size) is int and json.dumps(made.batch_size) == "4"


# --- the cases, by gin


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"BATCH_SIZE": "16"}, "BATCH_SIZE is '16', expected a whole number of at least 1; did you mean 16?"),
        ({"TRAIN_STEPS": "2"}, "TRAIN_STEPS is '2', expected a whole number of at least 1; did you mean 2?"),
        ({"TRAIN_STEPS": 2.0}, "TRAIN_STEPS is 2.0, expected a whole number of at least 1; did you mean 2?"),
        ({"RANDOM_SEED": "a"}, "RANDOM_SEED is 'a', expected a whole number from 0 to 4294967295"),
        ({"RANDOM_SEED": -1}, "RANDOM_SEED is -1, expected a whole number from 0 to 4294967295"),
        ({"LEARNING_RATE": "abc"}, "LEARNING_RATE is 'abc', expected a number above 0 and of at most 1000000, or a"),
        ({"LEARNING_RATE": -0.3}, "LEARNING_RATE is -0.3, expected a number above 0"),
        ({"LEARNING_RATE": 1e38}, "LEARNING_RATE is 1e+38, expected a number above 0"),
        ({"LEARNING_RATE": 0}, "LEARNING_RATE is 0, expected a number above 0"),
        ({"WEIGHT_DECAY": "1e-5"}, "WEIGHT_DECAY is '1e-5', expected a number in [0, 1); did you mean 1e-05?"),
        ({"DROPOUT_RATE": "0.1"}, "DROPOUT_RATE is '0.1', expected a number in [0, 1); did you mean 0.1?"),
        ({"DROPOUT_RATE": 1.5}, "DROPOUT_RATE is 1.5, expected a number in [0, 1)"),
        ({"DROPOUT_RATE": 1}, "DROPOUT_RATE is 1, expected a number in [0, 1)"),
        ({"LOG_PERIOD": 0}, "LOG_PERIOD is 0, expected a whole number of at least 1"),
        ({"EVAL_BATCH_SIZE": 1.5}, "EVAL_BATCH_SIZE is 1.5, expected a whole number of at least 1"),
        ({"EVAL_SPLIT": 7}, "EVAL_SPLIT is 7, expected a text that is not blank"),
        ({"PROMPT_LENGTH": 5.5}, "PROMPT_LENGTH is 5.5, expected a whole number from 1 to 4064, the room beside"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": 16.7, "targets": 8}}, "TASK_FEATURE_LENGTHS['inputs'] is 16.7, expected"),
        ({"TASK_FEATURE_LENGTHS": {"inputs": "16", "targets": 8}}, "TASK_FEATURE_LENGTHS['inputs'] is '16', expected"),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 8, "target": 32}},
            "TASK_FEATURE_LENGTHS has the key 'target', expected 'inputs' and 'targets'; did you mean 'targets'?",
        ),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 1}},
            "TASK_FEATURE_LENGTHS['targets'] is 1, expected a whole number of at least 2",
        ),
        ({"OPTIMIZER_START_STEP": -1}, "OPTIMIZER_START_STEP is -1, expected a whole number of at least 0"),
        ({"ACTIVATION_DTYPE": "float33"}, "ACTIVATION_DTYPE is 'float33', expected one of 'auto', 'float32', "),
        ({"MESH": {"modl": 2}}, "MESH has the key 'modl', expected 'data' or 'fsdp' or 'model'; did you mean 'model'?"),
        ({"MODEL_DIR": 5}, "MODEL_DIR is 5, expected a text that is not blank"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_before_anything_is_read(train_line, macros, message):
    assert train_line(**macros).startswith(message)


@pytest.mark.parametrize(
    "files, macros, message",
    [
        (["prompts/class_labels.gin"], {"CLASS_LABELS": "positive"}, "CLASS_LABELS is 'positive', expected a list of"),
        (["prompts/string.gin"], {"PROMPT_TEXT": 5}, "PROMPT_TEXT is 5, expected a text"),
        (["prompts/from_file.gin"], {"PROMPT_FILE": ["a"]}, "PROMPT_FILE is ['a'], expected a text that is not blank"),
        (["prompts/nearest.gin"], {"PROMPT_FOLDER": 1, "PROMPT_LIKE": "a"}, "PROMPT_FOLDER is 1, expected a text"),
        ([], {"PROMPT_INIT": "random"}, "PROMPT_INIT is 'random', expected a function"),
        (["tasks/files.gin"], {"TASK_FILES": {"train": "a"}, "LABELS": "yes no"}, "LABELS is 'yes no', expected"),
        (["tasks/files.gin"], {"TASK_FILES": {"train": "a"}, "METRICS": "accuracy"}, "METRICS is 'accuracy', expected"),
    ],
)  # fmt: skip
def test_a_text_is_no_list_and_a_list_no_text(train_line, files, macros, message):
    files = ["runs/prompt_tune.gin", *files]
    if not any(file.startswith("prompts/") for file in files) and "PROMPT_INIT" not in macros:
        files.append("prompts/random_uniform.gin")
    assert train_line(*files, **macros).startswith(message)


def test_a_setting_without_a_macro_is_named_as_gin_binds_it(train_line):
    found = train_line(bindings=["--gin.run.TrainConfig.z_loss='a'"])
    assert found == "TrainConfig.z_loss is 'a', expected a finite number of at least 0"
    assert train_line(bindings=["--gin.config.T5Config.emb_dim=1.5"]).startswith("T5Config.emb_dim is 1.5, expected")


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"EVAL_BATCH_SIZE": 1.5}, "EVAL_BATCH_SIZE is 1.5, expected a whole number of at least 1"),
        ({"PROMPT_FILE": 5}, "PROMPT_FILE is 5, expected a text or None"),
        ({"PROMPT_FILES": "a.npy"}, "PROMPT_FILES is 'a.npy', expected a list of texts or None; did you mean ["),
        ({"SAMPLES": "4"}, "SAMPLES is '4', expected a whole number of at least 0; did you mean 4?"),
        ({"BASE_DTYPE": 32}, "BASE_DTYPE is 32, expected"),
    ],
)  # fmt: skip
def test_eval_says_the_same(eval_line, macros, message):
    assert eval_line() is None
    assert eval_line(**macros).startswith(message)


def test_right_settings_are_accepted(train_line):
    assert train_line() is None
    assert train_line(EARLY_STOP_EVALS=3, NUM_MICROBATCHES=2, MESH={"data": 1}, RANDOM_SEED=2**32 - 1) is None


# --- from Python


@pytest.mark.parametrize(
    "changed, setting, message",
    [
        ({"steps": 2.0}, "train_steps", "`steps` is 2.0, expected a whole number of at least 1; did you mean 2?"),
        ({"batch_size": "2"}, "batch_size", "`batch_size` is '2', expected a whole number"),
        ({"eval_batch_size": 1.5}, "eval_batch_size", "`eval_batch_size` is 1.5, expected a whole number"),
        ({"eval_every": True}, "eval_period", "`eval_every` is True, expected a whole number"),
        ({"log_every": 0}, "log_period", "`log_every` is 0, expected a whole number"),
        ({"seed": -1}, "random_seed", "`seed` is -1, expected a whole number from 0 to"),
        ({"dropout_rate": 1.5}, "dropout_rate", "`dropout_rate` is 1.5, expected a number in [0, 1)"),
        ({"lengths": {"inputs": 8, "target": 4}}, "task_feature_lengths", "`lengths` has the key 'target', expected"),
        ({"labels": "yes no"}, "labels", "`labels` is 'yes no', expected a list of texts or None; did"),
        ({"metrics": "accuracy"}, "metrics", "`metrics` is 'accuracy', expected a list of texts or None"),
        ({"method": pt.LoRA}, "method", "expected a method such as PromptTuning(length=100); did you mean LoRA(...)?"),
        ({"method": pt.PromptTuning(5.5)}, "prompt_length", "`length` is 5.5, expected a whole number from 1 to 4088"),
        ({"method": pt.LoRA(alpha="a")}, "alpha", "`alpha` is 'a', expected a finite number"),
        ({"method": pt.LoRA(targets=5)}, "targets", "`targets` is 5, expected a list of texts"),
        ({"method": pt.ModelTuning(".*scale")}, "parameters", "`parameters` is '.*scale', expected a list of texts"),
        ({"method": pt.ModelTuning(["("])}, "parameters", "`parameters` has '(', expected regular expressions"),
        ({"method": pt.MPT(5)}, "tasks", "`tasks` is 5, expected a list of texts"),
        ({"method": pt.PromptTuning(3, pt.init.RandomUniform)}, "prompt_init", "`init` is <class"),
        ({"optimizer": "adam"}, "optimizer", "`optimizer` is 'adam', expected an optimiser of optax"),
        ({"optimizer": optax.adamw("abc")}, "optimizer", "`optimizer` cannot update what the method trains (TypeError"),
        ({"model": "nano"}, "model", "expected a base model of `load`; did you mean pt.load('nano')?"),
        ({"num_microbatches": 2.0}, "num_microbatches", "`num_microbatches` is 2.0, expected"),
        ({"base_dtype": "float33"}, "model", "`base_dtype` is not an argument of `train`: set `model`"),
        ({"train_steps": 5}, "steps", "`train_steps` is not an argument of `train`: set `steps`"),
        ({"size": None}, "model", "`size` is not an argument of `train`: set `model`"),
        ({"folder": 5}, "model_dir", "`folder` is 5, expected a text"),
        ({"on_record": "print"}, "on_record", "`on_record` is 'print', expected a function"),
    ],
)  # fmt: skip
def test_python_names_the_argument(refused, changed, setting, message):
    error = refused(**changed)
    assert message in str(error) and error.setting == setting


def test_evaluate_says_the_same(model):
    for changed, message in (
        ({"batch_size": "2"}, "`batch_size` is '2', expected a whole number"),
        ({"lengths": {"inputs": 8}}, "`lengths` has no key 'targets', expected 'inputs' and 'targets'"),
        ({"labels": "yes no"}, "`labels` is 'yes no', expected a list of texts"),
    ):
        with pytest.raises(SettingError) as raised:
            pt.evaluate(model, ROWS, **changed)
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pt.init.RandomUniform(minval="a"), "`minval` is 'a', expected a finite number"),
        (lambda: pt.init.RandomUniform(0.5, -0.5), "`minval` is 0.5, above `maxval`, -0.5"),
        (lambda: pt.init.SampledVocabulary("a"), "`population` is 'a', expected a whole number of at least 4"),
        (
            lambda: pt.init.ClassLabels("positive"),
            "`labels` is 'positive', expected a list of texts; did you mean ['pos",
        ),
        (lambda: pt.init.FromFile(5), "`prompt` is 5, expected a text"),
        (lambda: optimizer.adafactor(0.3, weight_decay=1), "`weight_decay` is 1, expected a number in [0, 1)"),
        (lambda: optimizer.adafactor(0.3, momentum=2), "`momentum` is 2, expected a number in [0, 1) or None"),
        (lambda: optimizer.adamw(0), "`learning_rate` is 0, expected a number above 0"),
        (lambda: optimizer.clipped_adamw(0.1, clip_norm=0), "`clip_norm` is 0, expected a finite number above 0"),
        (lambda: optimizer.warmup_linear(0.1, 2.0), "`steps` is 2.0, expected a whole number of at least 1"),
        (lambda: optimizer.warmup_cosine(0, 2), "`peak` is 0, expected a number above 0"),
        (lambda: T5Config(128, 16, 2, 1, 1, 0), "`mlp_dim` is 0, expected a whole number of at least 1"),
    ],
)
def test_what_is_made_beforehand_says_it_when_it_is_made(make, message):
    with pytest.raises(SettingError) as raised:
        make()
    assert str(raised.value).startswith(message)


def test_optax_has_the_same_adamw():
    """Every update is equal, with optax's default settings."""
    ours, theirs = optimizer.adamw(0.1), optax.adamw(0.1)
    params = {"x": jnp.linspace(-1, 1, 7)}
    states, found = [ours.init(params), theirs.init(params)], []
    for made, state in zip((ours, theirs), states, strict=True):
        for _ in range(3):
            updates, state = made.update(params, state, params)
        found.append(jax.tree.leaves(updates)[0])
    np.testing.assert_array_equal(*found)


# --- initialisers


def test_an_initialiser_of_jax_is_one(model):
    key = jax.random.key(0)
    found = start_prompt(jax.nn.initializers.normal(0.1), key, 3, model)
    np.testing.assert_array_equal(found, jax.nn.initializers.normal(0.1)(key, (3, 16), jnp.float32))
    np.testing.assert_array_equal(start_prompt(jax.nn.initializers.zeros, key, 3, model), np.zeros((3, 16)))
    own = start_prompt(lambda key, length, model: jnp.full((length, model.config.emb_dim), 2.0), key, 3, model)
    np.testing.assert_array_equal(own, np.full((3, 16), 2.0))


@pytest.mark.parametrize(
    "init, message",
    [
        (lambda key: None, "`init` takes (key), expected a function of (key, length, model) or of (key, shape, dtype)"),
        (lambda key, length, model: jnp.zeros((length, 3)), "`init` gives float32 [3, 3], expected float32 [3, 16]"),
        (lambda key, length, model: jnp.zeros((3, 16), int), "`init` gives int32 [3, 16], expected float32 [3, 16]"),
        (lambda key, length, model: None, "`init` gives a NoneType, expected float32 [3, 16]"),
    ],
)  # fmt: skip
def test_an_initialiser_that_gives_no_prompt(refused, init, message):
    assert str(refused(method=pt.PromptTuning(3, init))) == message


# --- gin's macros


def test_two_ways_to_train_are_named(tiny):
    files = ["prompts/random_uniform.gin", "runs/prompt_tune.gin", "runs/model_tune.gin"]
    with pytest.raises(ValueError) as raised:
        gin.clear_config()
        gin_files.parse(tiny.arguments(*files, MODEL_DIR="run"))
    assert str(raised.value) == (
        "runs/model_tune.gin replaces what reads the macro WEIGHT_DECAY of runs/prompt_tune.gin: give one of these two "
        "files"
    )


def sweep_line(arguments):
    return line_of(sweep.main, arguments, "runs/demo_seeds")


def test_a_binding_may_leave_a_macro_of_a_file_without_a_reader(capsys):
    arguments = ["--gin_file=sweeps/demo.gin", "--launcher=print", "--gin.spec.Sweep.grid={'RANDOM_SEED': [7]}"]
    assert sweep_line(arguments) is None
    assert "--gin.RANDOM_SEED=7" in capsys.readouterr().out
    found = sweep_line([*arguments, "--gin.SEEDS=[1]"])
    assert found == "nothing reads the macro SEEDS any more: another binding replaces what read it"


def test_a_file_that_sets_what_nothing_reads_is_named(tmp_path):
    path = tmp_path / "own.gin"
    path.write_text('include "sweeps/demo.gin"\nSEDS = [1]\n')
    found = sweep_line([f"--gin_file={path}", "--launcher=print"])
    assert found == f"nothing reads the macro SEDS that {path} sets; did you mean SEEDS?"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gin.LEARNING_RATE=-1"], "trial RANDOM_SEED=0: LEARNING_RATE is -1, expected a number above 0"),
        (["--gin.SEEDS=[0, -1]"], "trial RANDOM_SEED=-1: RANDOM_SEED is -1, expected a whole number from 0"),
        (["--gin.SEEDS=5"], "axis RANDOM_SEED of the sweep's grid is 5, expected a list of values"),
        (["--gin.spec.Sweep.grid=5"], "Sweep.grid is 5, expected lists of values by axis"),
        (["--gin.spec.Sweep.grid=[5]"], "Sweep.grid is [5], expected lists of values by axis"),
        (["--gin.VECTORIZE='2'"], "VECTORIZE is '2', expected 'auto', False, or how many trials"),
        (["--gin.SWEEP_DIR=7"], "SWEEP_DIR is 7, expected a text that is not blank"),
        (["--gin.spec.Sweep.gin_files='runs/demo.gin'"], "Sweep.gin_files is 'runs/demo.gin', expected a list"),
        (["--gin.spec.Sweep.choices={'A': {'b': 1}}"], "Sweep.choices['A']['b'] is 1, expected a mapping"),
        (["--gin.PROCESSES='2'", "--launcher=local"], "PROCESSES is '2', expected a whole number of at least 1 or"),
    ],
)  # fmt: skip
def test_a_sweep_refuses_before_its_first_trial(arguments, message):
    launcher = [] if any("launcher" in argument for argument in arguments) else ["--launcher=print"]
    assert sweep_line(["--gin_file=sweeps/demo.gin", *launcher, *arguments]).startswith(message)


def test_a_sweep_checks_trials_that_only_evaluate(tmp_path):
    path = tmp_path / "own.gin"
    path.write_text(
        'include "sweeps/sweep.gin"\nfrom __gin__ import dynamic_registration\n'
        "from prompt_tuning_jax.sweeps import spec\n"
        "spec.Sweep:\n  grid = {'EVAL_BATCH_SIZE': [1.5]}\n  command = 'eval'\n"
        "  gin_files = ['models/nano.gin', 'runs/eval.gin']\n"
        "  macros = {'PROMPT_FILE': None, 'MIXTURE_OR_TASK_NAME': 'a', 'INITIAL_CHECKPOINT_PATH': 'nano',"
        " 'TASK_FEATURE_LENGTHS': {'inputs': 8, 'targets': 4}}\n"
    )
    found = sweep_line([f"--gin_file={path}", "--launcher=print", f"--gin.SWEEP_DIR={str(tmp_path / 's')!r}"])
    assert found == ("trial EVAL_BATCH_SIZE=1.5: EVAL_BATCH_SIZE is 1.5, expected a whole number of at least 1")


def test_the_status_of_a_sweep_needs_its_folder_alone(tmp_path, capsys):
    record = {"RANDOM_SEED=0": ["--gin_file=runs/own.gin", "--gin.TRAIN_STEPS=40"], "RANDOM_SEED=1": []}
    (tmp_path / "RANDOM_SEED=0").mkdir()
    (tmp_path / "RANDOM_SEED=0" / "metrics.jsonl").write_text(
        '{"step": 20, "split": "eval", "accuracy": 50.0, "seconds": 9.0}\n'
    )
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="0"):
        _main(sweep.main, [f"--status={tmp_path}"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "2 trials: 1 stopped, 1 waiting" and "20/40" in shown[1].replace(" ", "")
    # The macros that the sweep was started with, such as MODEL_DIR, are not needed.
    with pytest.raises(SystemExit, match="0"):
        _main(sweep.main, ["--gin_file=sweeps/demo.gin", "--status", f"--gin.SWEEP_DIR={str(tmp_path)!r}"])
    assert capsys.readouterr().out.splitlines()[-1] == "8 trials: 1 stopped, 7 waiting"
    found = line_of(sweep.main, [f"--status={tmp_path / 'absent'}"], tmp_path / "absent")
    assert found.startswith("no sweep was started in ") and found.endswith("set --status to a SWEEP_DIR")


def _main(main, arguments):
    gin.clear_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        main()


# --- the size of a base model


def test_the_files_of_a_base_model_give_its_size(tiny, tmp_path):
    asked = T5Config(dropout_rate=0.25, dtype="bfloat16", remat_policy="full")
    assert not asked.has_size and CONFIG.has_size
    assert with_size(asked, str(tiny.base)) == dataclasses.replace(
        CONFIG, dropout_rate=0.25, dtype=jnp.bfloat16, remat_policy="full"
    )
    assert with_size(CONFIG, None) is CONFIG
    odd = dataclasses.replace(CONFIG, head_dim=4, num_decoder_layers=2)
    huggingface.write(tmp_path / "odd", odd, random_of(odd), tiny.vocabulary)
    assert with_size(T5Config(), str(tmp_path / "odd")) == odd


def random_of(config):
    from prompt_tuning_jax.checkpoints.base import expected_shapes

    return {name: np.ones(shape, np.float32) for name, shape in expected_shapes(config).items()}


def test_a_size_that_the_files_contradict_is_refused(tiny):
    with pytest.raises(SettingError, match=r"has another size than the configuration \(emb_dim 16, not 24\)"):
        with_size(T5Config(emb_dim=24), str(tiny.base))
    with pytest.raises(
        SettingError, match=r"size is unknown \(missing: vocab_size, .*\): set `where` .*, or set T5Config.vocab_size"
    ):
        with_size(T5Config(emb_dim=24), None)


def test_the_gin_file_that_leaves_the_size_to_the_files(tiny, tmp_path, monkeypatch):
    arguments = [argument for argument in tiny.arguments(MODEL_DIR=str(tmp_path)) if str(tiny.gin) not in argument]
    arguments = ["--gin_file=models/from_files.gin", *arguments]
    gin.clear_config()
    gin_files.parse(arguments)
    made = gin_files.configured(run.TrainConfig, "")()
    assert made.size == dataclasses.replace(CONFIG, dropout_rate=0.1)
    line = line_of(TRAIN, [*arguments, "--gin.config.T5Config.emb_dim=24"], tmp_path / "run")
    assert line is not None and "has another size than the configuration (emb_dim 16, not 24)" in line


# --- runs


def test_early_stopping_counts_what_an_undisturbed_run_would_have():
    """A run that was extended also has an evaluation at its earlier last step, 25, which must not count."""
    dataset = DatasetConfig("rows", "train", 2, LENGTHS)

    def config(steps):
        return run.TrainConfig(
            size=CONFIG, initial_checkpoint_path=None, train_dataset=dataset, eval_dataset=dataset,
            method=pt.PromptTuning(3), optimizer=optax.sgd(0.1), train_steps=steps, eval_period=10, early_stop_evals=2,
        )  # fmt: skip

    scores = {10: 50.0, 20: 40.0, 25: 40.0}
    records = [{"step": step, "split": "eval", "accuracy": score} for step, score in scores.items()]
    assert run.stop_reason(records, config(40)) is None
    assert run.stop_reason(records, config(25)) == "no better evaluation in 2"
    records.append({"step": 30, "split": "eval", "accuracy": 40.0})
    assert run.stop_reason(records, config(40)) == "no better evaluation in 2"


def test_a_warning_names_the_setting_as_the_front_end_does(model, tiny, capsys):
    long = [{"inputs": "a dull film " * 9, "targets": "good"}] * 2
    warned = r"rows train: `lengths` {'inputs': 8, 'targets': 4} truncate inputs of 2 of 2"
    with pytest.warns(UserWarning, match=warned), pytest.raises(SettingError):
        pt.train(model, pt.PromptTuning(3), long, ROWS, **FITTING | {"labels": None, "optimizer": optax.sgd("a")})
    data = pt.files({"train": str(tiny.folder / "long.jsonl")})
    (tiny.folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    dataset = DatasetConfig("long", "train", 2, {"inputs": 8, "targets": 4}, source=data.source)
    with gin_files.user_errors():
        dataset.eval_batches(model.tokenizer)
    assert (
        "long train: TASK_FEATURE_LENGTHS {'inputs': 8, 'targets': 4} truncate inputs of 2 of 2"
        in capsys.readouterr().err
    )


# --- one name for all command lines


def test_every_command_line_has_one_name(monkeypatch, capsys):
    for command in commands.COMMANDS:
        module = "tasks.__main__" if command == "tasks" else command
        assert callable(importlib.import_module(f"prompt_tuning_jax.{module}").main)
    monkeypatch.setattr(sys, "argv", ["prompt-tuning"])
    commands.main()
    assert "neighbors" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["prompt-tuning", "trian"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert capsys.readouterr().err == "error: no command trian; did you mean train?\n"


def test_the_command_is_the_modules(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prompt-tuning", "train", "--gin_file=runs/absent.gin"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert capsys.readouterr().err.startswith("error: no gin file runs/absent.gin; ")
    found = subprocess.run([sys.executable, ROOT / "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True)
    assert "prompt_tuning_jax" in found.stdout
    assert '"prompt-tuning = prompt_tuning_jax.__main__:main"' in (ROOT / "setup.py").read_text()


# --- neighbours of the cases

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**32, 10**400, -(2**63), 1e38, 1e300, -0.0, float("nan"), float("inf")]),
    st.floats(-3, 3),
    st.text(max_size=3),
    st.sampled_from(["16", "0.1", "abc", "auto", "yes no", b"16"]),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=2), st.none()), max_size=2),
    st.dictionaries(st.sampled_from(["inputs", "targets", "target", "data", "model"]), st.integers(-1, 9), max_size=3),
    st.tuples(st.text(max_size=2)),
)
OBJECTS = [np.int64(3), np.float32(0.5), np.bool_(True), np.arange(3), np.zeros((2, 2)), object(), int, len, 1j]
PYTHONS = st.one_of(ODD, st.sampled_from(OBJECTS))


def macros_of(*files):
    """Returns the names of the macros that gin files set."""
    gin.clear_config()
    for folder in gin_files.SEARCH_PATHS:
        gin.add_config_file_search_path(str(folder))
    with gin_files.files_alone():
        for file in files:
            gin.parse_config_file(file)
    config = gin.config_str()
    gin.clear_config()
    return sorted(set(re.findall(r"(?m)^([A-Z]\w*) = ", config)))


def whole_command(file):
    """Returns the gin files and macros that a run with `file` needs in addition to those of `tiny.arguments`."""
    text = (ROOT / "gin_configs" / file).read_text()
    own = {"POPULATION": 300, "TOKENS": 8, "RANK": 4, "TASKS": ("a", "b")}
    macros = {name: value for name, value in own.items() if f"\n{name} = " in text}
    return [file, *(["prompts/random_uniform.gin"] if "%PROMPT_INIT" in text else [])], macros


@pytest.mark.parametrize("file", RUNS)
def test_every_way_to_train_is_accepted(train_line, file):
    files, macros = whole_command(file)
    assert train_line(*files, **macros) is None


@pytest.mark.parametrize("file", RUNS)
def test_train_accepts_a_value_or_refuses_it_in_one_line(tiny, tmp_path, file):
    files, macros = whole_command(file)
    folder = tmp_path / "never"

    @settings(max_examples=25)
    @given(macro=st.sampled_from(macros_of("models/t5_1_1.gin", file)), value=ODD)
    def accepts_or_refuses(macro, value):
        if macro != "MODEL_DIR" or not isinstance(value, str):
            line_of(TRAIN, tiny.arguments(*files, **macros | {"MODEL_DIR": str(folder), macro: value}), folder)

    accepts_or_refuses()


def test_train_does_so_for_own_files(tiny, tmp_path):
    folder, own = tmp_path / "never", {"TASK_FILES": {"train": "a.jsonl"}, "MODEL_DIR": str(tmp_path / "never")}
    files = ["runs/prompt_tune.gin", "prompts/random_uniform.gin", "tasks/files.gin"]

    @settings(max_examples=60)
    @given(macro=st.sampled_from(macros_of("tasks/files.gin")), value=ODD)
    def accepts_or_refuses(macro, value):
        line_of(TRAIN, tiny.arguments(*files, **own | {macro: value}), folder)

    accepts_or_refuses()


STARTS = {
    "class_labels": "CLASS_LABELS",
    "string": "PROMPT_TEXT",
    "from_file": "PROMPT_FILE",
    "nearest": "PROMPT_FOLDER",
}


def test_train_does_so_for_the_starts_of_prompts(tiny, tmp_path):
    folder = tmp_path / "never"

    @settings(max_examples=60)
    @given(start=st.sampled_from(sorted(STARTS)), value=ODD)
    def accepts_or_refuses(start, value):
        macros = {"MODEL_DIR": str(folder), STARTS[start]: value} | ({"PROMPT_LIKE": "a"} if start == "nearest" else {})
        line_of(TRAIN, tiny.arguments("runs/prompt_tune.gin", f"prompts/{start}.gin", **macros), folder)

    accepts_or_refuses()


OF_COMMAND = ("config", "allow_other_config", "model_dir")  # set by the command itself, and the output folder
FIELDS_OF_RUN = [field.name for field in dataclasses.fields(run.TrainConfig) if field.name not in OF_COMMAND]
OF_SIZE = [f"config.T5Config.{field.name}" for field in dataclasses.fields(T5Config)]
OF_DATA = [field.name for field in dataclasses.fields(DatasetConfig)]
PARAMETERS = [f"run.TrainConfig.{name}" for name in FIELDS_OF_RUN] + OF_SIZE
PARAMETERS += [f"{scope}/dataset.DatasetConfig.{name}" for scope in ("train", "eval") for name in OF_DATA]


def test_train_does_so_for_parameters_without_a_macro(tiny, tmp_path):
    folder = tmp_path / "never"

    @settings(max_examples=100)
    @given(parameter=st.sampled_from(PARAMETERS), value=ODD)
    @example("run.TrainConfig.size", 5)
    @example("run.TrainConfig.train_dataset", {})
    @example("run.TrainConfig.eval_dataset", None)
    @example("run.TrainConfig.model", 5)
    @example("train/dataset.DatasetConfig.tasks", {"a": 1})
    def accepts_or_refuses(parameter, value):
        line_of(TRAIN, [*tiny.arguments(MODEL_DIR=str(folder)), f"--gin.{parameter}={value!r}"], folder)

    accepts_or_refuses()


OF_EVAL = [name for name in inspect.signature(eval_run.evaluate_prompt).parameters if name != "model_dir"]
OF_EVAL = [f"eval_run.evaluate_prompt.{name}" for name in OF_EVAL] + OF_SIZE
OF_EVAL += [f"dataset.DatasetConfig.{name}" for name in OF_DATA]


def test_eval_accepts_a_value_or_refuses_it_in_one_line(tiny, tmp_path):
    folder = tmp_path / "never"
    own = {"MIXTURE_OR_TASK_NAME": "a", "TASK_FEATURE_LENGTHS": LENGTHS, "PROMPT_FILE": None, "MODEL_DIR": str(folder)}
    own["INITIAL_CHECKPOINT_PATH"] = str(tiny.base)

    @settings(max_examples=100)
    @given(name=st.sampled_from([*macros_of("models/t5_1_1.gin", "runs/eval.gin"), *OF_EVAL]), value=ODD)
    @example("eval_run.evaluate_prompt.size", 5)
    @example("eval_run.evaluate_prompt.dataset", {})
    @example("dataset.DatasetConfig.tasks", [1])
    @example("dataset.DatasetConfig.source", "rows.jsonl")
    def accepts_or_refuses(name, value):
        arguments = [f"--gin.{name}={value!r}" for name, value in (own | {name: value}).items()]
        line_of(EVAL, [f"--gin_file={tiny.gin}", "--gin_file=runs/eval.gin", *arguments], folder)

    accepts_or_refuses()


LAUNCHERS = {"jobset": jobset.JobSet, "local": local.Local, "slurm": slurm.Slurm, "xpk": xpk.Xpk}
SWEEPS = ["LEARNING_RATE", "BATCH_SIZE", "EVAL_BATCH_SIZE", "CLASS_LABELS", "DROPOUT_RATE", "TASK_FEATURE_LENGTHS"]
SWEEPS += [name for name in macros_of("sweeps/demo.gin") if name != "SWEEP_DIR"]
OF_SWEEP = [field.name for field in dataclasses.fields(spec.Sweep) if field.name != "sweep_dir"]
SWEEPS += [f"spec.Sweep.{name}" for name in OF_SWEEP]
SWEEPS += [
    f"{name}.{one.__name__}.{field.name}" for name, one in LAUNCHERS.items() for field in dataclasses.fields(one)
]


def test_sweep_accepts_a_value_or_refuses_it_in_one_line(tmp_path):
    folder = tmp_path / "never"

    @settings(max_examples=100)
    @given(name=st.sampled_from(SWEEPS), value=ODD)
    def accepts_or_refuses(name, value):
        seeds = [] if name in ("SEEDS", "spec.Sweep.grid") else ["--gin.SEEDS=[0]"]
        arguments = ["--gin_file=sweeps/demo.gin", "--launcher=print", f"--gin.SWEEP_DIR={str(folder)!r}", *seeds]
        with contextlib.redirect_stdout(io.StringIO()):
            line_of(sweep.main, [*arguments, f"--gin.{name}={value!r}"], folder)

    accepts_or_refuses()


@settings(max_examples=100)
@given(
    field=st.sampled_from([(one, field.name) for one in LAUNCHERS.values() for field in dataclasses.fields(one)]),
    value=PYTHONS,
)
def test_launchers_accept_a_value_or_refuse_it_in_one_line(field, value):
    launcher, name = field
    try:
        launcher(**{name: value})
    except ValueError as error:
        assert "\n" not in str(error)


ARGUMENTS = [
    "steps", "batch_size", "labels", "metrics", "lengths", "eval_every", "eval_batch_size", "log_every", "seed",
    "dropout_rate", "folder", "on_record", "progress", "optimizer", "method", "model", "num_microbatches", "z_loss",
    "keep_checkpoints", "early_stop_evals", "mesh", "num_partitions", "export_dtype", "loss_eval_steps",
    "encoder_use_by",
]  # fmt: skip


def test_a_dataset_config_of_no_tasks_is_refused():
    config = DatasetConfig("none", "train", 2, LENGTHS, tasks={})
    with pytest.raises(SettingError, match="^`tasks` is {}, expected at least one task$"):
        config.check()


def test_no_argument_of_train_is_forgotten_below():
    named = {*inspect.signature(pt.train).parameters} - {"more", "train", "validation"}
    assert named | {*FIELDS_OF_RUN} - {*api.FIELDS_OF_ARGUMENTS} == {*ARGUMENTS}


def test_python_accepts_a_value_or_refuses_it_in_one_line(model, tmp_path):
    folder = tmp_path / "never"

    @settings(max_examples=200)
    @given(name=st.sampled_from(ARGUMENTS), value=PYTHONS)
    @example("seed", np.int64(7))
    def accepts_or_refuses(name, value):
        if name == "folder" and isinstance(value, str):
            return
        given_ = FITTING | {"folder": folder, "model": model, "method": pt.PromptTuning(3), name: value}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "Run", reached)
            try:
                pt.train(given_.pop("model"), given_.pop("method"), ROWS, ROWS, **given_)
            except Reached:
                pass
            except SettingError as error:
                assert "\n" not in str(error) and error.setting
        assert not folder.exists()

    accepts_or_refuses()


FIELDS = {
    pt.PromptTuning: ("length", "init"), pt.ResidualPrompt: ("bottleneck",), pt.LoRA: ("rank", "alpha", "targets"),
    pt.IA3: ("targets", "feedforward"), pt.PrefixTuning: ("length", "stacks"), pt.MPT: ("tasks", "rank"),
    pt.ModelTuning: ("parameters",), pt.ULPT: ("rank", "projection_seed"), pt.MLPPrompt: ("hidden_size",),
    pt.SuperPos: ("tokens", "population", "token_seed"), pt.LSTMPrompt: ("lstm_layers",),
    pt.PerLayerPrompt: ("combine",),
    pt.MultitaskPrompt: ("tasks", "combine", "task_length", "shared_features", "scale"), pt.LowRankPrompt: ("rank",),
}  # fmt: skip


@settings(max_examples=200)
@given(field=st.sampled_from([(kind, name) for kind, names in FIELDS.items() for name in names]), value=PYTHONS)
def test_the_fields_of_a_method_are_accepted_or_refused_in_one_line(field, value):
    kind, name = field
    try:
        kind(**{name: value}).check(CONFIG, 8)
    except SettingError as error:
        assert "\n" not in str(error) and error.setting


FLAGS = {
    "infer": ["input_length", "max_new_tokens", "batch_size", "beams", "temperature", "top_k", "top_p", "seed"],
    "serve": [
        "input_length", "max_new_tokens", "batch_size", "beams", "port", "wait_ms", "max_rows", "max_bytes",
        "max_tokens", "max_queue", "max_connections", "timeout", "poll",
    ],
    "neighbors": ["top"],
    "tasks.__main__": ["inputs_length", "targets_length", "rows"],
}  # fmt: skip
FIRST = {"neighbors": ["prompt.npy"], "tasks.__main__": ["show", "demo_reviews"]}
READS = {"infer": "load_predictor", "serve": "listen", "neighbors": "open_table", "tasks.__main__": "show"}
TEXTS = st.one_of(ODD.map(str), st.integers().map(str), st.floats().map(repr), st.sampled_from(["1e3", "0x10", " 5 "]))


@settings(max_examples=200)
@given(flag=st.sampled_from([(command, name) for command, names in FLAGS.items() for name in names]), text=TEXTS)
@example(("infer", "top_p"), "5e-324")
@example(("infer", "seed"), "9" * 5000)
@example(("serve", "port"), "65536")
@example(("serve", "timeout"), "inf")
def test_a_flag_is_accepted_or_refused_in_one_line_that_names_it(tmp_path_factory, flag, text):
    command, name = flag
    module = importlib.import_module(f"prompt_tuning_jax.{command}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, READS[command], reached)
        line = line_of(module.main, [*FIRST.get(command, ()), f"--{name}={text}"], tmp_path_factory.getbasetemp() / "x")
    number = None
    with contextlib.suppress(ValueError):
        number = float(text)
    if number is None or not np.isfinite(number) or number < 0:
        assert line is not None
    # The message may name another of these settings, because they are also compared with each other.
    if line is not None and name not in ("max_rows", "max_queue", "wait_ms", "timeout"):
        assert re.match(rf"--{name} is .*, expected ", line), line


@settings(max_examples=100)
@given(name=st.sampled_from([field.name for field in dataclasses.fields(Decoding)]), value=PYTHONS)
def test_how_to_decode_is_accepted_or_refused_in_one_line(model, name, value):
    try:
        reader = Reader(model.tokenizer, 8, Decoding(**{"decode": "sample", name: value}))
        asked = reader.request({"prompt": None, "inputs": "a"}, 3)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert type(asked.seed) is type(asked.top_k) is int and type(asked.temperature) is type(asked.top_p) is float


@settings(max_examples=100)
@given(name=st.sampled_from(Limits._fields), value=PYTHONS)
def test_the_limits_of_a_service_are_accepted_or_refused_in_one_line(name, value):
    try:
        Limits(**{name: value}).check()
    except SettingError as error:
        assert "\n" not in str(error) and error.setting

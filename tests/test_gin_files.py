"""The gin files that come with the package, and what the command line makes of them and of a user's mistakes."""

import dataclasses
import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import gin
import numpy as np
import pytest

from experiments.sizes import SIZES
from prompt_tuning_jax import demo, eval, gin_files, sweep
from prompt_tuning_jax.batches import dataset
from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
from prompt_tuning_jax.prompts.initializers import ClassLabels
from prompt_tuning_jax.t5 import config

train = importlib.import_module("prompt_tuning_jax.train")  # `prompt_tuning_jax.train` is the function
CONFIGS = Path(__file__).parent.parent / "gin_configs"
MODELS = [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.glob("models/*.gin"))]
SIZE_FILES = [model for model in MODELS if model not in ("models/t5_1_1.gin", "models/from_files.gin")]
PROMPTS = [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.glob("prompts/*.gin"))]
TASK = {
    "MIXTURE_OR_TASK_NAME": "taskless_glue_sst2_v200",
    "TASK_FEATURE_LENGTHS": {"inputs": 64, "targets": 8},
    "INITIAL_CHECKPOINT_PATH": "a_base",
}
RUN = TASK | {"MODEL_DIR": "runs/test"}
METHODS = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("methods/*.gin"))
CONSTRUCTED = ("train_dataset", "eval_dataset", "size", "method")  # the arguments of a run that gin makes by a call
OF_PROMPT = {
    "prompts/class_labels.gin": {"CLASS_LABELS": ["positive", "negative"]},
    "prompts/from_file.gin": {"PROMPT_FILE": "prompt.npy"},
    "prompts/nearest.gin": {"PROMPT_FOLDER": "runs", "PROMPT_LIKE": "runs/target"},
    "prompts/string.gin": {"PROMPT_TEXT": "is it 100% good? It %IS"},
}


pytestmark = pytest.mark.usefixtures("only_this_tests_gin")


def parse(*files, flags=(), **macros):
    gin.clear_config()
    bindings = [f"--gin.{name}={value!r}" for name, value in macros.items()]
    return gin_files.parse([*(f"--gin_file={file}" for file in files), *bindings], flags)


def refused(*arguments):
    gin.clear_config()
    with pytest.raises(ValueError) as error:
        gin_files.parse(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_tuning_is_any_model_with_any_prompt_in_any_order(model, prompt):
    texts = set()
    for files in itertools.permutations([model, prompt, "runs/prompt_tune.gin"]):
        parse(*files, **RUN, **OF_PROMPT.get(prompt, {}))
        texts.add(gin_files.config_text())
    assert len(texts) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_any_model_before_or_after_it(method):
    """With a start from prompts/, if it takes one: the settings are those of the method."""
    starts = ["prompts/random_uniform.gin"] if "%PROMPT_INIT" in (CONFIGS / method).read_text() else []
    macros = RUN | {"TRAIN_STEPS": 10}
    if "TASKS" in defined(CONFIGS / method):
        macros["TASKS"] = ("sst2", "mrpc")
    parse(MODELS[0], *starts, method, **macros)
    first = gin_files.config_text()
    parse(method, MODELS[0], *starts, **macros)
    assert gin_files.config_text() == first
    given = gin.query_parameter("run.TrainConfig.method").scoped_configurable_fn()
    assert type(given).__name__.lower() == Path(method).stem.replace("_", "")
    given.check(SIZES["nano"], 32)
    gin.query_parameter("run.TrainConfig.optimizer").scoped_configurable_fn()


@pytest.mark.parametrize("run", ["runs/model_tune.gin", "runs/pretrain.gin", "runs/eval.gin"])
@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_any_model_before_or_after_it(model, run):
    macros = TASK | {"PROMPT_FILE": None} if run == "runs/eval.gin" else RUN | {"TRAIN_STEPS": 10}
    parse(model, run, **macros)
    first = gin_files.config_text()
    parse(run, model, **macros)
    assert gin_files.config_text() == first


@pytest.mark.parametrize("file", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("bases/*.gin")))
def test_the_files_that_made_the_embedded_base(file):
    parse(file, MODEL_DIR="runs/base", DATA_DIR="text", VOCABULARY="spiece.model")
    assert gin.query_parameter("%EXPORT_DTYPE") in ("float32", "bfloat16")


def test_the_demos_file():
    parse("runs/demo.gin")
    assert gin.query_parameter("%MODEL_DIR") == "runs/demo"


def test_no_gin_file_is_left_out_of_these_tests():
    tested = {
        *MODELS,
        *PROMPTS,
        *METHODS,
        *(f"runs/{run}.gin" for run in "train prompt_tune prompt_tune_fast model_tune pretrain eval demo".split()),
    }
    tested |= {"bases/nano_span.gin", "bases/nano_lm.gin", "tasks/files.gin"}
    tested |= {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("t5x/*.gin")}  # test_t5x_host.py
    tested |= {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("sweeps/*.gin")}  # test_sweep_files.py
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.gin")} == tested


@pytest.mark.parametrize("model", SIZE_FILES)
def test_a_models_file_is_the_size_of_its_name(model):
    parse(model, "prompts/random_uniform.gin", "runs/prompt_tune.gin", **RUN)
    found = gin.get_configurable(config.T5Config)()
    expected = SIZES[Path(model).stem.removeprefix("t5_1_1_")]
    expected = dataclasses.replace(expected, dropout_rate=0.1)
    remat = {"models/t5_1_1_xl.gin": "minimal", "models/t5_1_1_xxl.gin": "full"}.get(model, "none")
    assert found == dataclasses.replace(expected, remat_policy=remat)


def test_the_fast_recipe_is_prompt_tuning_with_another_learning_rate_and_no_dropout():
    """Its learning rate rises during 5% of the steps, and falls along a cosine to 5% of its peak."""
    files = ["models/nano.gin", "prompts/random_uniform.gin"]
    given = []
    for recipe in ("runs/prompt_tune.gin", "runs/prompt_tune_fast.gin"):
        gin.clear_config()
        parse(*files, recipe, **RUN | {"TRAIN_STEPS": 200})
        given.append({name: gin.query_parameter(f"run.TrainConfig.{name}") for name in ("method", "train_steps")})
        given[-1] |= {"dropout": gin.get_configurable(config.T5Config)().dropout_rate}
    assert str(given[0]["method"]) == str(given[1]["method"])
    assert (given[0]["dropout"], given[1]["dropout"]) == (0.1, 0.0)
    schedule = gin.query_parameter("optimizer.adafactor.learning_rate").scoped_configurable_fn()
    np.testing.assert_allclose([schedule(step) for step in (0, 5, 10, 200)], [0.0, 0.5, 1.0, 0.05], rtol=1e-6)
    half = 0.05 + 0.95 * (1 + np.cos(np.pi * 0.5)) / 2
    np.testing.assert_allclose(schedule(105), half, rtol=1e-6)


def test_what_a_run_is_given_is_what_the_macros_say():
    parse(
        "models/nano.gin", "prompts/class_labels.gin", "runs/prompt_tune.gin",
        **RUN, CLASS_LABELS=["good", "bad"], PROMPT_LENGTH=7, BATCH_SIZE=3, EVAL_BATCH_SIZE=4, DROPOUT_RATE=0.25,
        EVAL_SPLIT="train[-9:]", DATA_DIR="data", MIXTURE_OR_TASK_MODULE="own.tasks",
    )  # fmt: skip
    given = {name: gin.query_parameter(f"run.TrainConfig.{name}").scoped_configurable_fn() for name in CONSTRUCTED}
    common = {"mixture_or_task_name": TASK["MIXTURE_OR_TASK_NAME"], "data_dir": "data", "module": "own.tasks"}
    common |= {"task_feature_lengths": TASK["TASK_FEATURE_LENGTHS"]}
    assert given["train_dataset"] == dataset.DatasetConfig(**common, split="train", batch_size=3)
    assert given["eval_dataset"] == dataset.DatasetConfig(**common, split="train[-9:]", batch_size=4)
    assert given["size"].dropout_rate == 0.25
    assert given["method"] == PromptTuning(7, ClassLabels(["good", "bad"]))


def defined(path):
    """The macros that a file sets itself."""
    return set(re.findall(r"(?m)^([A-Z][A-Z0-9_]*) *=", path.read_text()))


def included(path):
    """The files that a file includes, directly or not."""
    names = re.findall(r'(?m)^include "(.+)"', path.read_text())
    direct = {CONFIGS / name for name in names if (CONFIGS / name).is_file()}  # t5x/ includes T5X's own, too
    return direct.union(*map(included, direct))


def test_no_macro_is_set_in_two_folders():
    """So that the order of the gin files on a command line cannot matter.

    A file may override what it includes itself: that order is its own.
    """
    exceptions = {
        # prompts/ has what training starts from, runs/eval.gin what is scored: never on one command line.
        "PROMPT_FILE": {"prompts", "runs"},
        "PROMPT_TEXT": {"prompts", "runs"},
    }
    folders = {}
    for path in set(CONFIGS.rglob("*.gin")) - set(CONFIGS.glob("sweeps/*.gin")):  # which no run includes
        own = defined(path) - set().union(*map(defined, included(path)))
        for macro in own:
            # A command line has files of runs/, or of methods/, or, under T5X, of t5x/.
            folder = path.parent.name
            folders.setdefault(macro, set()).add("runs" if folder in ("t5x", "methods") else folder)
    assert {macro: where for macro, where in folders.items() if len(where) > 1} == exceptions


FILES = ("models/nano.gin", "prompts/random_uniform.gin", "runs/prompt_tune.gin")
ARGUMENTS = [
    *(f"--gin_file={file}" for file in FILES),
    *(f"--gin.{name}={value!r}" for name, value in RUN.items()),
]


def test_a_misspelt_macro_is_refused_with_its_near_misses():
    message = refused(*ARGUMENTS, "--gin.PROMT_LENGTH=5")
    assert message.startswith("no macro PROMT_LENGTH in these gin files; did you mean PROMPT_LENGTH")
    assert "no macro QQQ in these gin files; there are ACTIVATION_DTYPE, ATTENTION, BASE_DTYPE," in refused(
        *ARGUMENTS, "--gin.QQQ=5"
    )


def test_a_misspelt_macro_in_a_users_own_file_is_refused_too(tmp_path):
    (tmp_path / "own.gin").write_text("LERNING_RATE = 0.1\n")
    message = refused(*ARGUMENTS, f"--gin_file={tmp_path / 'own.gin'}")
    assert (
        message == f"nothing reads the macro LERNING_RATE that {tmp_path / 'own.gin'} sets; did you mean LEARNING_RATE?"
    )


def test_a_macro_that_only_a_binding_reads_is_known():
    gin_files.parse([*ARGUMENTS, "--gin.MY_RATE=0.1", "--gin.LEARNING_RATE=%MY_RATE"])
    assert gin.query_parameter("%MY_RATE") == 0.1


def test_a_percent_sign_in_a_text_is_no_macro():
    gin_files.parse([*ARGUMENTS, "--gin.MODEL_DIR='runs/50%OFF'", "--gin.DATA_DIR='it\\'s %HERE'"])
    assert gin.query_parameter("%MODEL_DIR") == "runs/50%OFF"


def test_what_must_be_set_is_named():
    message = refused(*(argument for argument in ARGUMENTS if "MODEL_DIR" not in argument))
    assert message == "MODEL_DIR must be set: --gin.MODEL_DIR=..."
    message = refused(
        *(argument for argument in ARGUMENTS if "prompts/" not in argument and "TASK_NAME" not in argument)
    )
    assert message == "MIXTURE_OR_TASK_NAME and PROMPT_INIT must be set: --gin.MIXTURE_OR_TASK_NAME=..."


@pytest.mark.parametrize(
    "argument, parts",
    [
        ("--gin_file=models/nanno.gin", ["no gin file models/nanno.gin; did you mean", "models/nano.gin"]),
        ("--gin_file=zzz", ["no gin file zzz; there are", "prompts/class_labels.gin", "runs/pretrain.gin"]),
        ("--gin.run.TrainConfig.eval_perid=3", ["--gin.run.TrainConfig.eval_perid=3", "did you mean eval_period"]),
        (
            "--gin.run.TrainConfg.eval_period=3",
            ["No configurable matching 'run.TrainConfg'", "did you mean run.TrainConfig?"],
        ),
        ("--gin.MODEL_DIR=runs/x", ["--gin.MODEL_DIR=runs/x", "a text in quotes of its own: --gin.NAME=\"'text'\""]),
        ("--gin.MODEL_DIR", ["--gin.MODEL_DIR: ", "expected"]),
        ("--gin.PROMPT_INIT=@initializers.random", ["initializers.random"]),
        ("--model_dir=x", ["unknown argument '--model_dir=x'; expected --gin_file=FILE,", "--gin.NAME=VALUE"]),
        ("models/nano.gin", ["unknown argument 'models/nano.gin'; expected --gin_file=FILE"]),
        ("--gin_file", ["unknown argument '--gin_file'; expected --gin_file=FILE"]),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(argument, parts):
    message = refused(*ARGUMENTS, argument)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "text, part",
    [
        ('include "models/nanno.gin"\n', "models/nanno.gin"),
        ("BATCH_SIZE == 3\n", "own.gin"),
        ("from __gin__ import dynamic_registration\nimport prompt_tuning_jax.no_such\n", "no_such"),
        ("BATCH_SIZE = 3\nrun.TrainConfig:\n  model_dirr = 'x'\n", "own.gin"),
    ],
)
def test_a_mistake_in_a_users_file_names_the_file(tmp_path, text, part):
    (tmp_path / "own.gin").write_text(text)
    message = refused(*ARGUMENTS, f"--gin_file={tmp_path / 'own.gin'}")
    assert "own.gin" in message and part in message


COMMANDS = {train: "runs/prompt_tune.gin", eval: "runs/eval.gin", sweep: "sweeps/demo.gin", demo: "runs/demo.gin"}


@pytest.mark.parametrize("command, file", COMMANDS.items())
def test_help_says_what_a_command_does_and_what_can_be_set(command, file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command.__name__, f"--gin_file={file}", "--help"])
    monkeypatch.setattr(command, "keep_compiled_programs", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code in (0, None)
    said = capsys.readouterr().out
    assert said.startswith(command.__doc__.strip())
    files, macros = said.removeprefix(command.__doc__.strip()).split("--gin.NAME=VALUE")
    folder, name = file.split("/")
    assert f" {name}" in files.split(f"  {folder}/")[1]
    own = dict(re.findall(r"(?m)^([A-Z_]+) = (.*)$", (CONFIGS / file).read_text()))
    shown = dict(re.findall(r"(?m)^  ([A-Z_]+)(?: = |, )(.*)$", macros))
    assert own.keys() <= shown.keys()
    required = re.findall(r"(?m)^([A-Z_]+) = %gin.REQUIRED$", gin.config_str())
    assert sorted(required) == [name for name, value in shown.items() if value == "which must be set"]


@pytest.mark.parametrize("command, file", list(COMMANDS.items())[:3])  # the demo has its own
def test_a_command_without_its_gin_file_names_one(command, file):
    done = subprocess.run([sys.executable, "-m", command.__name__], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no gin file given sets up ") and f"add --gin_file={file}" in done.stderr


def test_other_flags_are_the_commands_own():
    assert gin_files.parse([*ARGUMENTS, "--allow_other_config"], ("allow_other_config",)) == {
        "allow_other_config": True
    }
    gin.clear_config()
    assert gin_files.parse([*ARGUMENTS, "--launcher=slurm"], ("launcher",)) == {"launcher": "slurm"}


def test_gin_files_are_found_from_anywhere_and_so_are_the_users(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fast.gin").write_text("TRAIN_STEPS = 7\n")
    (tmp_path / "here.gin").write_text("BATCH_SIZE = 5\n")
    monkeypatch.chdir(tmp_path)
    gin_files.parse([*ARGUMENTS, "--gin_search_paths=mine", "--gin_file=fast.gin", "--gin_file=here.gin"])
    assert (gin.query_parameter("%TRAIN_STEPS"), gin.query_parameter("%BATCH_SIZE")) == (7, 5)


@pytest.mark.parametrize("package", [True, False])
def test_a_folder_called_runs_on_the_python_path_is_not_in_the_way(tmp_path, monkeypatch, package):
    """MODEL_DIR is usually below a folder of that name in the working directory."""
    for name in ("runs", "models"):
        (tmp_path / name / "demo").mkdir(parents=True)
        if package:
            (tmp_path / name / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    gin_files.parse(ARGUMENTS)
    assert gin.query_parameter("%TRAIN_STEPS") == 30_000
    assert not {"runs", "models"} & set(sys.modules)


def test_the_configuration_that_is_kept_says_all_but_where(tmp_path):
    """It is the same for two runs that differ in MODEL_DIR alone, and a run of its own when it is read again."""
    parse(*FILES, **RUN)
    first = gin_files.config_text()
    parse(*FILES, **RUN | {"MODEL_DIR": "/a/very/long/path/" + "x" * 200})
    assert gin_files.config_text() == first
    assert not re.search("(?m)^MODEL_DIR", first)
    parse(*FILES, **RUN, RANDOM_SEED=1)
    assert gin_files.config_text() != first

    (tmp_path / "config.gin").write_text(first)
    parse(tmp_path / "config.gin", MODEL_DIR="runs/again")
    assert gin_files.config_text() == first

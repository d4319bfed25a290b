"""The sweeps of gin_configs: their trials, what a trial is given, and what one sweep leaves for another."""

import dataclasses
import functools
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import gin
import pytest
import seqio

from experiments import ladder, ladder_tasks
from prompt_tuning_jax import gin_files
from prompt_tuning_jax.batches import dataset
from prompt_tuning_jax.batches.cache import split_rows
from prompt_tuning_jax.checkpoints.base import default_vocabulary
from prompt_tuning_jax.sweeps import spec
from prompt_tuning_jax.tasks import find, postprocessors, sources
from prompt_tuning_jax.tokenizers.vocabulary import UNK, Vocabulary
from prompt_tuning_jax.training import run

SWEEPS = Path(__file__).parent.parent / "gin_configs" / "sweeps"
FILES = {path.name: path.read_text() for path in sorted(SWEEPS.glob("*.gin"))}
NAMES = [
    name.removesuffix(".gin") for name, text in FILES.items() if re.search(r"(?m)^(spec\.Sweep\.|  )grid = ", text)
]
LADDER = [name for name in NAMES if "ladder" in name]
SIZES = {"models/pico.gin", "models/nano.gin", "models/micro.gin", "models/mini.gin"}
TABLE_3 = ("table_3", "table_3_ladder")  # their seeds are in one trial
RUN_MACROS = set("MODEL_DIR RANDOM_SEED TRAIN_STEPS EVAL_PERIOD LOG_PERIOD PROMPT_LENGTH VOCABULARY".split())
RUN_MACROS |= {"INITIAL_CHECKPOINT_PATH"}


pytestmark = pytest.mark.usefixtures("only_this_tests_gin")


def comment(name: str) -> str:
    return FILES[f"{name}.gin"].partition("from __gin__")[0]


@functools.cache
def sweep(name: str) -> spec.Sweep:
    """The sweep of the command in its file's first lines: what they give is all that must be given."""
    gin.clear_config()
    given = re.findall(r"--gin\.(\w+)=\"('.*?')\"", comment(name))
    gin_files.parse([f"--gin_file=sweeps/{name}.gin", *(f"--gin.{macro}={value}" for macro, value in given)])
    found = gin.get_configurable(spec.Sweep)()
    gin.clear_config()
    return found


@functools.cache
def trials_of(name: str) -> list[spec.Trial]:
    return sweep(name).trials()


def grids_of(found: spec.Sweep) -> list[Mapping[str, Sequence]]:
    return [found.grid] if isinstance(found.grid, Mapping) else [*found.grid]


def widened(name: str) -> list[spec.Trial]:
    """The sweep's trials with all values that a user may widen an axis to, such as SIZES=["mini"]."""
    found = sweep(name)
    wide = {axis: [*values] for axis, values in found.choices.items() if axis in ("SIZE", "TASK", "OF_SEED")}
    grids = [{axis: wide.get(axis, values) for axis, values in grid.items()} for grid in grids_of(found)]
    return dataclasses.replace(found, grid=grids).trials()


def kinds(trials: list[spec.Trial]) -> list[spec.Trial]:
    """One trial of each set of files and macros: the others have other values in the same places."""
    return [*{(trial.command, trial.gin_files, frozenset(trial.macros)): trial for trial in trials}.values()]


def parse(trial: spec.Trial) -> None:
    gin.clear_config()
    gin_files.parse(trial.arguments)


def datasets(trial: spec.Trial) -> dict[str, dataset.DatasetConfig]:
    """What a parsed trial trains on, and is scored on."""
    if trial.command == "eval":
        return {"eval": gin.get_configurable(dataset.DatasetConfig)()}
    config = gin.get_configurable(run.TrainConfig)()
    return {"train": config.train_dataset, "eval": config.eval_dataset}


def task_of(trial: spec.Trial, name: str) -> seqio.Task | seqio.Mixture:
    module = trial.macros.get("MIXTURE_OR_TASK_MODULE")
    return find.find(name, [module] if module else [])


def parts_of(task: seqio.Task | seqio.Mixture) -> Sequence[seqio.Task]:
    return task.tasks if isinstance(task, seqio.Mixture) else [task]


def test_the_folder_has_no_sweep_that_is_not_found_here():
    without_a_grid = {f"{name}.gin" for name in NAMES} ^ set(FILES)
    says_so = re.compile(r"not\s(# )?a sweep by itself|^# Include this for trials|, for ")
    described = {name for name in without_a_grid if says_so.search(FILES[name])}
    assert without_a_grid == described | {"sweep.gin"}
    assert len(NAMES) == 27


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_what_its_first_lines_say(name):
    """The command, how many trials there are, and their folders: of the sweep's name, its axes, and a seed."""
    assert all(line.startswith("#") for line in comment(name).splitlines())
    assert f"python -m prompt_tuning_jax.sweep --gin_file=sweeps/{name}.gin --launcher=" in comment(name)
    found, trials = sweep(name), trials_of(name)
    count = re.search(r"(?m)^# (\d+) trials?( per size)?\b", comment(name))
    assert count, comment(name)
    assert len(trials) == int(count[1]) * (len({trial.values["SIZE"] for trial in trials}) if count[2] else 1)
    assert found.sweep_dir == ("runs/demo_seeds" if name == "demo" else f"runs/{name}")  # runs/demo is the demo itself
    for grid in grids_of(found):
        axes = list(grid)
        assert "TASK" not in axes or axes.index("SIZE") < axes.index("TASK")
        bases = name.startswith(("ladder_", "lm_"))
        without_seeds = bases or name in TABLE_3 or grid.get("METHOD") == ["prompt_design"]
        assert without_seeds or axes[-1] == found.seeds in ("RANDOM_SEED", "OF_SEED")
    for trial in trials:
        assert trial.name == ",".join(f"{axis}={value}" for axis, value in trial.values.items())
        assert str(trial.folder) == f"{found.sweep_dir}/{trial.name}"
        assert not re.search(r"[{]\w+[}]", " ".join(trial.arguments))
        assert trial.command == ("eval" if "runs/eval.gin" in trial.gin_files else "train")


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_trial_is_a_whole_command_line_on_registered_tasks(name):
    trials = kinds(widened(name))
    if name in LADDER:
        assert {file for trial in trials for file in trial.gin_files} >= SIZES
    for trial in trials:
        parse(trial)
        for scope, one in datasets(trial).items():
            tasks = parts_of(task_of(trial, one.mixture_or_task_name))
            assert any(split_rows(one.split)[0] in part.splits for part in tasks), (trial.name, one)
            given = {"data_dir": "DATA_DIR", "task_feature_lengths": "TASK_FEATURE_LENGTHS"}
            given |= (
                {"split": "TRAIN_SPLIT", "batch_size": "BATCH_SIZE"} if scope == "train" else {"split": "EVAL_SPLIT"}
            )
            for field, macro in given.items():
                assert getattr(one, field) == trial.macros.get(macro, getattr(one, field)), (trial.name, macro)
        if trial.command == "train":
            config = gin.get_configurable(run.TrainConfig)()
            for macro in RUN_MACROS & set(trial.macros):
                given = config.method.length if macro == "PROMPT_LENGTH" else getattr(config, macro.lower())
                assert given == trial.macros[macro], (trial.name, macro)


@pytest.mark.parametrize("name", ["figure_1", "table_2", *[name for name in LADDER if name.startswith("figure_")]])
def test_class_labels_are_the_tasks_own_as_its_vocabulary_writes_them(name):
    trials = {trial.values["TASK"]: trial for trial in trials_of(name) if "CLASS_LABELS" in trial.macros}
    assert len(trials) == {"figure_1": 8, "table_2": 2, "figure_1_ladder": 3}.get(name, 1)
    words = Vocabulary(str(default_vocabulary("nano")))
    for task, trial in trials.items():
        labels, tasks = trial.macros["CLASS_LABELS"], parts_of(task_of(trial, trial.macros["MIXTURE_OR_TASK_NAME"]))
        closed = {label for one in tasks for label in postprocessors.answers(one.postprocessor) or ()}
        if name in LADDER:
            assert all(UNK not in words.encode(label) for label in labels), labels
            closed = {label.replace("_", " ") for label in closed}
        assert task in ("record", "wsc") or set(labels) == closed


def test_the_ladders_prompts_in_words_can_be_written():
    words = Vocabulary(str(default_vocabulary("nano")))
    trials = [trial for name in LADDER for trial in trials_of(name)]
    texts = {trial.macros["PROMPT_TEXT"] for trial in trials if "PROMPT_TEXT" in trial.macros}
    assert len(texts) == 3
    assert all(UNK not in words.encode(text) for text in texts)


@pytest.mark.parametrize("name", ["figure_3c", "figure_3c_ladder"])
def test_the_sentinels_tasks_are_those_of_the_same_trials_without(name):
    found: dict[str, dict[str, dict[str, str]]] = {}
    for trial in trials_of(name):
        if trial.values["RANDOM_SEED"] == "0" and trial.values["SIZE"] in ("small", "nano"):
            parse(trial)
            found.setdefault(trial.values["TASK"], {})[trial.values["OBJECTIVE"]] = {
                scope: one.mixture_or_task_name for scope, one in datasets(trial).items()
            }
    assert len(found) == {"figure_3c": 8, "figure_3c_ladder": 1}[name]
    for objectives in found.values():
        assert objectives["span"] == objectives["lm"]
        plain = objectives["span"]["train"]
        sentinel = re.sub("^(taskless_)?", r"\1sentinel_", plain)
        assert sentinel != plain
        assert objectives["span_sentinel"] == {"train": sentinel, "eval": sentinel}
        assert find.find(sentinel).name == sentinel


def test_what_a_sweep_reads_is_what_another_leaves():
    """Bases, prompts and models under runs/ are those of trials of the sweeps named there."""
    made = {str(trial.folder): trial for name in NAMES for trial in trials_of(name)}
    reading = set()
    for name in NAMES:
        for trial in trials_of(name):
            files = [trial.macros.get("INITIAL_CHECKPOINT_PATH"), trial.macros.get("PROMPT_FILE")]
            files += trial.macros.get("PROMPT_FILES", ())
            for file in (file for file in files if file and file.startswith("runs/")):
                reading.add(name)
                folder, _, best = file.partition("/best/")
                assert folder in made, (trial.name, file)
                prompt = "runs/prompt_tune.gin" in made[folder].gin_files
                assert made[folder].command == "train" and best == ("prompt.npy" if prompt else "model")
    assert reading == {"figure_3d", "methods", "table_1_transfer", "table_2_transfer", "table_3", *LADDER} - {
        "ladder_span",
        "ladder_learning_rates",
    }


@pytest.mark.parametrize("name", ["table_1", "table_2"])
def test_a_transfer_scores_what_was_tuned_on_the_base_that_it_was_tuned_on(name):
    tuned = {str(trial.folder): trial for trial in trials_of(name)}
    used = set()
    for trial in trials_of(f"{name}_transfer"):
        base, prompt = trial.macros["INITIAL_CHECKPOINT_PATH"], trial.macros["PROMPT_FILE"]
        folder = str(Path(prompt or base).parent.parent)
        made = tuned[folder]
        used.add(folder)
        assert made.values["METHOD"] == trial.values["METHOD"]
        assert made.values["RANDOM_SEED"] == trial.values["OF_SEED"]
        if prompt:
            assert base == made.macros["INITIAL_CHECKPOINT_PATH"]
    assert used == set(tuned)


@pytest.mark.parametrize(("name", "base"), [("ladder_span", "span"), ("ladder_lm", "lm")])
def test_the_ladders_nano_is_made_as_the_embedded_base_was(name, base):
    """Where the text and the vocabulary are the same. The last trial has all the steps."""
    where = {"VOCABULARY": "words", "DATA_DIR": "text", "INITIAL_CHECKPOINT_PATH": "before", "MODEL_DIR": "after"}
    texts = [f"{macro}={value!r}" for macro, value in where.items()]
    parse(trials_of(name)[-1]._replace(texts=texts))
    found = gin_files.config_text()
    gin.clear_config()
    gin_files.parse([f"--gin_file=bases/nano_{base}.gin", *(f"--gin.{text}" for text in texts)])
    assert found == gin_files.config_text()


def test_the_ladders_mixture_is_its_tasks_and_their_splits():
    trials = {trial.values["TASK"]: trial for trial in trials_of("figure_1_ladder") if "TASK" in trial.values}
    splits = {}
    for trial in trials.values():
        name = trial.macros["MIXTURE_OR_TASK_NAME"].removeprefix("taskless_")
        splits[name] = {"train": trial.macros["TRAIN_SPLIT"], "validation": trial.macros["EVAL_SPLIT"]}
    assert splits == ladder_tasks.SPLITS
    mixture = find.find(ladder_tasks.NAME, ["experiments.ladder_tasks"])
    assert isinstance(mixture, seqio.Mixture)
    assert {task.name for task in mixture.tasks} == {f"ladder_{name}" for name in splits}


def test_the_ladders_rows_to_train_on_and_to_score_are_apart(data_dir):
    """In the numbers that the mixture's rates are made of."""
    sources.set_data_dir(str(data_dir))
    try:
        splits = {
            (name, split): seqio.TaskRegistry.get(f"ladder_{name}").source.get_dataset(split, shuffle=False)
            for name in ladder_tasks.SPLITS
            for split in ("train", "validation")
            if name != "glue_sst2_v200"
        }
        found = {name: int(rows.cardinality()) for (name, split), rows in splits.items() if split == "train"}
        of_imdb = [splits["imdb_reviews_v100", split] for split in ("train", "validation")]
        whole = seqio.TaskRegistry.get("imdb_reviews_v100").source.get_dataset("train", shuffle=False)
        train, held_back, reviews = ([row["text"] for row in rows.as_numpy_iterator()] for rows in (*of_imdb, whole))
        assert train == reviews[:-2000] and held_back == reviews[-500:]
    finally:
        sources.set_data_dir(None)
    # SST-2 is long to read as a task: its lines but for the header and the rows of its split, train[:-2000].
    found["glue_sst2_v200"] = (data_dir / "glue" / "SST-2" / "train.tsv").read_bytes().count(b"\n") - 1 - 2_000
    assert found == ladder_tasks.EXAMPLES


def test_the_ladders_command_runs_each_of_its_sweeps(monkeypatch):
    """As whole commands; a sweep that fails ends it with the sweep's exit code."""
    given = ["--gin.DATA_DIR='data'", "--gin.LM_BASE='bases/{SIZE}'"]
    *sweeps, answers, figures = ladder.commands(["pico", "nano"], given)
    for command in sweeps:
        gin.clear_config()
        gin_files.parse([argument for argument in command if argument.startswith("--gin")])
        trials = gin.get_configurable(spec.Sweep)().trials()
        assert {trial.values["SIZE"] for trial in trials} == {"pico", "nano"}
        assert all(trial.macros["DATA_DIR"] == "data" for trial in trials)
    bases = {f"ladder_{base}" for base in ("span", "lm", "learning_rates")}
    assert {f"{name}_ladder" for name in ladder.SWEEPS} == {name for name in NAMES if "ladder" in name} - bases
    assert answers[1:] == ["-m", "experiments.answers", "--results=runs"]
    assert figures[1:] == ["-m", "experiments.figures", "--results=runs"]

    monkeypatch.setattr("sys.argv", ["ladder", "--sizes=pico", "--gin.DATA_DIR='data'"])
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command) or SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit) as stopped:
        ladder.main()
    assert stopped.value.code == 3 and ran == ladder.commands(["pico"], ["--gin.DATA_DIR='data'"])[:1]

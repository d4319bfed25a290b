"""The sweeps of gin_configs: their trials, what a trial is given, and what one sweep leaves for another."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin
import pytest
import seqio

from experiments import ladder_tasks
from prompt_tuning_jax import gin_files
from prompt_tuning_jax.batches import dataset
from prompt_tuning_jax.batches.cache import split_rows
from prompt_tuning_jax.checkpoints.base import default_vocabulary
from prompt_tuning_jax.sweeps import spec
from prompt_tuning_jax.tasks import find, postprocessors, sources
from prompt_tuning_jax.tasks.vocabularies import UNK, Vocabulary
from prompt_tuning_jax.training import run

SWEEPS = Path(__file__).parent.parent / "gin_configs" / "sweeps"
FILES = {path.name: path.read_text() for path in sorted(SWEEPS.glob("*.gin"))}
NAMES = [
    name.removesuffix(".gin") for name, text in FILES.items() if re.search(r"(?m)^(spec\.Sweep\.|  )grid = ", text)
]
LADDER = [name for name in NAMES if "ladder" in name]
TABLE_3 = ("table_3", "table_3_ladder")  # their seeds are in one trial
# What a user must set, where a sweep asks for it.
GIVEN = {"DATA_DIR": "data", "VOCABULARY": "spiece.model"}
RUN_MACROS = set("MODEL_DIR RANDOM_SEED TRAIN_STEPS EVAL_PERIOD LOG_PERIOD PROMPT_LENGTH VOCABULARY".split())
RUN_MACROS |= {"INITIAL_CHECKPOINT_PATH"}
REPEATED = re.compile(r"RANDOM_SEED|OF_SEED")


@pytest.fixture(autouse=True)
def only_this_tests_gin(monkeypatch):
    gin.clear_config()
    monkeypatch.setattr(gin_files, "SEARCH_PATHS", list(gin_files.SEARCH_PATHS))
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    yield
    gin.clear_config()


@functools.cache
def sweep(name: str) -> spec.Sweep:
    """The sweep, with what it asks for set."""
    gin.clear_config()
    path = f"--gin_file=sweeps/{name}.gin"
    try:
        gin_files.parse([path])
    except ValueError as error:
        asked = str(error).partition(" must be set")[0].split(" and ")
        assert set(asked) <= set(GIVEN), str(error)
        gin.clear_config()
        gin_files.parse([path, *(f"--gin.{macro}={GIVEN[macro]!r}" for macro in asked)])
    found = gin.get_configurable(spec.Sweep)()
    gin.clear_config()
    return found


@functools.cache
def trials_of(name: str) -> list[spec.Trial]:
    return sweep(name).trials()


def grids_of(found: spec.Sweep) -> list[Mapping[str, Sequence]]:
    return [found.grid] if isinstance(found.grid, Mapping) else [*found.grid]


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


def test_the_folder_has_no_sweep_that_is_not_found_here():
    without_a_grid = {f"{name}.gin" for name in NAMES} ^ set(FILES)
    described = {name for name in without_a_grid if re.search(r"No sweep by itself|^# For trials|, for ", FILES[name])}
    assert without_a_grid == described | {"sweep.gin"}
    assert len(NAMES) == 21


@pytest.mark.parametrize("name", NAMES)
def test_the_first_lines_say_the_command_and_how_many_trials(name):
    comment = FILES[f"{name}.gin"].partition("from __gin__")[0]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"python -m prompt_tuning_jax.sweep --gin_file=sweeps/{name}.gin --launcher=" in comment
    count = re.search(r"(?m)^# (\d+) trials?\b", comment)
    assert count, comment
    assert len(trials_of(name)) == int(count[1])
    written = {binding[0]: binding[1] for binding in re.findall(r"--gin\.(\w+)=\"'(.*?)'\"", comment)}
    gin.clear_config()  # what the comment gives is all that must be given
    gin_files.parse([f"--gin_file=sweeps/{name}.gin", *(f"--gin.{key}={value!r}" for key, value in written.items())])


@pytest.mark.parametrize("name", NAMES)
def test_trials_have_folders_of_the_sweeps_name_axes_and_seeds(name):
    found = sweep(name)
    trials = trials_of(name)
    assert found.sweep_dir == f"runs/{name}"
    for grid in grids_of(found):
        axes = list(grid)
        assert "TASK" not in axes or axes.index("SIZE") < axes.index("TASK")
        if REPEATED.fullmatch(axes[-1]):
            assert axes[-1] == found.seeds
        else:
            bases = name.startswith(("ladder_", "lm_"))
            assert bases or name in TABLE_3 or grid["METHOD"] == ["prompt_design"]
    for trial in trials:
        assert trial.name == ",".join(f"{axis}={value}" for axis, value in trial.values.items())
        assert str(trial.folder) == f"runs/{name}/{trial.name}"
        assert not re.search(r"[{]\w+[}]", " ".join(trial.arguments))
        assert trial.command == ("eval" if "runs/eval.gin" in trial.gin_files else "train")


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_of_trial_is_a_whole_command_line_on_registered_tasks(name):
    """Those of values that a user may widen an axis to, such as SIZES=["mini"], among them."""
    found = sweep(name)
    widened = {axis: [*values] for axis, values in found.choices.items() if axis in ("SIZE", "TASK", "OF_SEED")}
    wide = [{axis: widened.get(axis, values) for axis, values in grid.items()} for grid in grids_of(found)]
    for trial in kinds(dataclasses.replace(found, grid=wide).trials()):
        parse(trial)
        for scope, one in datasets(trial).items():
            module = trial.macros.get("MIXTURE_OR_TASK_MODULE")
            task = find.find(one.mixture_or_task_name, [module] if module else [])
            tasks = task.tasks if isinstance(task, seqio.Mixture) else [task]
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
                assert getattr(config, macro.lower()) == trial.macros[macro], (trial.name, macro)


def labels_of(task) -> set[str]:
    tasks = task.tasks if isinstance(task, seqio.Mixture) else [task]
    return {label for one in tasks for label in postprocessors.answers(one.postprocessor) or ()}


@pytest.mark.parametrize("name", ["figure_1", "table_2", *[name for name in LADDER if name.startswith("figure_")]])
def test_class_labels_are_the_tasks_own_as_its_vocabulary_writes_them(name):
    trials = {trial.values["TASK"]: trial for trial in trials_of(name) if "CLASS_LABELS" in trial.macros}
    assert len(trials) == {"figure_1": 8, "table_2": 2}.get(name, 4)
    words = Vocabulary(str(default_vocabulary("nano")))
    for task, trial in trials.items():
        labels, module = trial.macros["CLASS_LABELS"], trial.macros.get("MIXTURE_OR_TASK_MODULE")
        closed = labels_of(find.find(trial.macros["MIXTURE_OR_TASK_NAME"], [module] if module else []))
        if name in LADDER:
            assert all(UNK not in words.encode(label) for label in labels), labels
            closed = {label.replace("_", " ") for label in closed}
        assert task in ("record", "wsc") or set(labels) == closed


@pytest.mark.parametrize("name", LADDER)
def test_the_ladders_prompts_in_words_can_be_written(name):
    words = Vocabulary(str(default_vocabulary("nano")))
    texts = [trial.macros["PROMPT_TEXT"] for trial in trials_of(name) if "PROMPT_TEXT" in trial.macros]
    assert len(set(texts)) == (3 if name == "figure_1_ladder" else 0)
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
    assert len(found) == {"figure_3c": 8, "figure_3c_ladder": 4}[name]
    for objectives in found.values():
        assert objectives["span"] == objectives["lm"]
        plain = objectives["span"]["train"]
        sentinel = plain.replace("taskless_", "taskless_sentinel_")
        assert sentinel != plain
        assert objectives["span_sentinel"] == {"train": sentinel, "eval": sentinel}
        assert find.find(sentinel).name == sentinel


@pytest.mark.parametrize("name", NAMES)
def test_what_a_sweep_reads_is_what_another_leaves(name):
    """Bases, prompts and models under runs/ are those of trials of the sweeps named there."""
    read = set()
    for trial in trials_of(name):
        files = [trial.macros.get("INITIAL_CHECKPOINT_PATH"), trial.macros.get("PROMPT_FILE")]
        read |= {file for file in [*files, *trial.macros.get("PROMPT_FILES", ())] if file and file.startswith("runs/")}
    own_base = name in ("figure_3d", "table_1_transfer", "table_2_transfer", "table_3")
    assert bool(read) == (own_base or name in LADDER and name != "ladder_span")
    trials = {}
    for file in read:
        _, maker, trial_name, best = file.split("/", 3)
        if maker not in trials:
            trials[maker] = {trial.name: trial for trial in trials_of(maker)}
        made = trials[maker][trial_name]
        prompt = "runs/prompt_tune.gin" in made.gin_files
        assert made.command == "train" and best == ("best/prompt.npy" if prompt else "best/model")


@pytest.mark.parametrize("name", ["table_1", "table_2"])
def test_a_transfer_scores_what_was_tuned_on_the_base_that_it_was_tuned_on(name):
    tuned = {str(trial.folder): trial for trial in trials_of(name)}
    scored = trials_of(f"{name}_transfer")
    used = set()
    for trial in scored:
        base, prompt = trial.macros["INITIAL_CHECKPOINT_PATH"], trial.macros["PROMPT_FILE"]
        folder = str(Path(prompt or base).parent.parent)
        made = tuned[folder]
        used.add(folder)
        assert made.values["METHOD"] == trial.values["METHOD"]
        assert made.values["RANDOM_SEED"] == trial.values["OF_SEED"]
        if prompt:
            assert base == made.macros["INITIAL_CHECKPOINT_PATH"]
    assert used == set(tuned)


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
        rows = {
            name: seqio.TaskRegistry.get(f"ladder_{name}").source.get_dataset("train", shuffle=False)
            for name in ladder_tasks.SPLITS
        }
        assert {name: int(train.cardinality()) for name, train in rows.items()} == ladder_tasks.EXAMPLES
        held_back = seqio.TaskRegistry.get("ladder_glue_mrpc_v200").source.get_dataset("validation", shuffle=False)
        numbers = [[row["idx"] for row in part.as_numpy_iterator()] for part in (rows["glue_mrpc_v200"], held_back)]
        assert numbers == [[*range(3_260)], [*range(3_260, 3_668)]]
    finally:
        sources.set_data_dir(None)

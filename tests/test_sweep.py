"""`python -m prompt_tuning_jax.sweep` as a user runs it: what it prints, refuses, runs, and takes up again."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from test_train import prompts, records, summary
from tiny import LENGTHS, PROMPT_LENGTH

from prompt_tuning_jax.sweeps.spec import Sweep

SWEEP = """
include "sweeps/sweep.gin"
from __gin__ import dynamic_registration
from prompt_tuning_jax.sweeps import spec

SEEDS = [0, 1, 2]
RATES = [0.3, 0.1]
TRAIN_STEPS = 60

GRID = {{"INIT": ["random", "words"], "LEARNING_RATE": %RATES, "RANDOM_SEED": %SEEDS}}

spec.Sweep:
  grid = %GRID
  gin_files = [{tiny!r}, "runs/prompt_tune.gin"]
  macros = {macros}
  seeds = "RANDOM_SEED"
  choices = {{
      "INIT": {{
          "random": {{"gin_files": ["prompts/random_uniform.gin"]}},
          "words": {{"gin_files": ["prompts/sampled_vocabulary.gin"]}},
      }},
  }}
"""

PROGRAM = [sys.executable, "-m", "prompt_tuning_jax.sweep"]


@pytest.fixture(scope="module")
def sweep_file(tiny, tmp_path_factory):
    macros = {
        "MIXTURE_OR_TASK_NAME": "demo_reviews",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "INITIAL_CHECKPOINT_PATH": str(tiny.base),
        "EVAL_SPLIT": "validation[:64]",
        "EVAL_BATCH_SIZE": 32,
        "BATCH_SIZE": 8,
        "PROMPT_LENGTH": PROMPT_LENGTH,
        "EVAL_PERIOD": 20,
        "LOG_PERIOD": 10,
    }
    text = repr(macros)[:-1] + ", 'TRAIN_STEPS': %TRAIN_STEPS}"
    path = tmp_path_factory.mktemp("sweep") / "grid.gin"
    path.write_text(SWEEP.format(tiny=str(tiny.gin), macros=text))
    return path


@pytest.fixture(scope="module")
def command(sweep_file):
    """The arguments of `sweep` but for SWEEP_DIR and the launcher."""
    return [f"--gin_file={sweep_file}"]


def in_folder(folder):
    return f"--gin.SWEEP_DIR={str(folder)!r}"


def run(tiny, command, *more):
    """Runs `sweep`: in a process of its own if it starts processes itself, whose output is then that of all."""
    if not {"--launcher=local", "--launcher=slurm"} & {*more}:
        return tiny.run([*command, *more], "sweep")
    return subprocess.run(
        [*PROGRAM, *command, *more], env=os.environ | tiny.environment, cwd=tiny.folder, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


def grid(**axes):
    """The sweep's grid with other axes; the macros in it stay."""
    axes = {"INIT": ["random", "words"]} | axes
    others = "".join(f", {name!r}: {values!r}" for name, values in axes.items() if name != "INIT")
    return f"--gin.GRID={{'INIT': {axes['INIT']!r}, 'LEARNING_RATE': %RATES, 'RANDOM_SEED': %SEEDS{others}}}"


def trial_folders(folder):
    return sorted(path for path in folder.iterdir() if "RANDOM_SEED=" in path.name)


def test_print_gives_a_command_a_trial_and_each_of_them_runs_it(tiny, command, tmp_path):
    done = run(tiny, command, in_folder(tmp_path), "--launcher=print", "--gin.LOG_PERIOD=5", "--gin.TRAIN_STEPS=20")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * 2 * 3 and not any(tmp_path.iterdir())
    assert [shlex.split(line)[:3] for line in lines] == [["python", "-m", "prompt_tuning_jax.train"]] * 12
    names = [
        f"INIT={i},LEARNING_RATE={r},RANDOM_SEED={s}" for i in ("random", "words") for r in (0.3, 0.1) for s in range(3)
    ]
    assert [re.search("MODEL_DIR='\"'\"'.*/(.+?)'", line)[1] for line in lines] == names
    trained = subprocess.run(
        [sys.executable, *shlex.split(lines[7])[1:]], env=os.environ | tiny.environment, cwd=tiny.folder, timeout=300
    )
    assert trained.returncode == 0
    assert summary(tmp_path / names[7])["steps"] == 20
    assert [record["step"] for record in records(tmp_path / names[7], "train")] == [5, 10, 15, 20]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gin.TRAIN_STEPZ=3"], ["no macro TRAIN_STEPZ", "did you mean TRAIN_STEPS"]),
        (["--gin.SEEDS=[]"], ["axis RANDOM_SEED", "is []", "expected a list of values"]),
        (["--gin.SEEDS=[0, 0]"], ["two trials are called INIT=random,LEARNING_RATE=0.3,RANDOM_SEED=0"]),
        (["--gin.RANDOM_SEED=4"], ["RANDOM_SEED is an axis"]),
        ([grid(INIT=["wrods"])], ["no choice 'wrods'", "did you mean 'words'"]),
        ([grid(NO_SUCH=[1])], ["trial INIT=random,LEARNING_RATE=0.3,RANDOM_SEED=0,NO_SUCH=1", "no macro NO_SUCH"]),
        (["--gin.VECTORIZE='all'"], ["VECTORIZE is 'all'", "expected 'auto'"]),
        (["--only=INIT=random,LEARNING_RATE=0.3,RANDOM_SEED=5"], ["no trial", "did you mean"]),
        (["--launcher=locl"], ["--launcher is locl", "expected one of here, print, local, slurm, xpk, jobset"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(tiny, command, tmp_path, arguments, parts):
    folder = tmp_path / "sweep"
    done = run(tiny, command, in_folder(folder), "--launcher=print", *arguments)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in parts), done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("empty", [{}, [], [{}]])
def test_a_sweep_has_a_grid(empty):
    with pytest.raises(ValueError, match="grid is empty: set Sweep.grid"):
        Sweep("runs/none", empty).trials()


@pytest.fixture(scope="module")
def finished(tiny, command, tmp_path_factory):
    """A sweep of six trials in one program, undisturbed."""
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    done = run(tiny, command, in_folder(folder), "--launcher=local", "--gin.RATES=[0.3]")
    assert done.returncode == 0, done.stderr
    return folder


def test_trials_are_as_if_they_had_been_trained_alone(tiny, command, finished, tmp_path):
    assert len(trial_folders(finished)) == 6
    name = "INIT=words,LEARNING_RATE=0.3,RANDOM_SEED=2"
    done = run(tiny, command, in_folder(tmp_path), "--launcher=print", "--gin.RATES=[0.3]", f"--only={name}")
    assert tiny.run(shlex.split(done.stdout)[3:]).returncode == 0
    assert prompts(tmp_path / name) == prompts(finished / name)
    assert records(tmp_path / name) == records(finished / name)
    assert summary(tmp_path / name) == summary(finished / name)
    assert (tmp_path / name / "config.gin").read_text() == (finished / name / "config.gin").read_text()


def test_finished_trials_are_left_out_and_a_grid_may_grow(tiny, command, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")}
    done = run(tiny, command, in_folder(finished), "--launcher=here", "--gin.RATES=[0.3]")
    assert done.returncode == 0 and "6 trials, 6 of them finished" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")} == before
    done = run(tiny, command, in_folder(finished), "--status", "--gin.RATES=[0.3, 0.1]")
    assert done.stdout.splitlines()[-1] == "12 trials: 6 finished, 6 waiting"


def test_finished_trials_may_get_more_steps(tiny, command, finished, tmp_path):
    """They end as if they had been given all steps at once. Trials that `--only` leaves out stay as they are."""
    arguments = [in_folder(tmp_path), "--launcher=here", "--gin.RATES=[0.3]"]
    first, second, *_ = names = [path.name for path in trial_folders(finished)]
    short = run(tiny, command, *arguments, "--gin.TRAIN_STEPS=40", f"--only={first}:{second}")
    assert short.returncode == 0, short.stderr
    done = run(tiny, command, *arguments, f"--only={first}")
    assert done.returncode == 0 and "1 trials, 0 of them finished" in done.stderr, done.stderr
    assert [summary(tmp_path / name)["steps"] for name in (first, second)] == [60, 40]
    (tmp_path / "sweep.json").unlink()  # commands of `--launcher=print` leave none
    done = run(tiny, command, *arguments)
    assert done.returncode == 0 and "6 trials, 1 of them finished" in done.stderr, done.stderr
    for name in names:
        assert prompts(tmp_path / name) == prompts(finished / name)
        assert records(tmp_path / name) == records(finished / name)
        assert summary(tmp_path / name) == summary(finished / name)
    fewer = run(tiny, command, *arguments, "--gin.TRAIN_STEPS=40")
    assert fewer.returncode == 2 and "(was --gin.TRAIN_STEPS=60, is --gin.TRAIN_STEPS=40)" in fewer.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gin.BATCH_SIZE=4"], "holds a trial INIT=random,LEARNING_RATE=0.3,RANDOM_SEED=0 of another configuration"),
        ([grid(LOG_PERIOD=[5])], "holds another sweep, of trials like INIT=random,LEARNING_RATE=0.3"),
    ],
)  # fmt: skip
def test_another_sweeps_folder_is_refused(tiny, command, finished, arguments, part):
    done = run(tiny, command, in_folder(finished), "--launcher=here", "--gin.RATES=[0.3]", *arguments)
    assert done.returncode == 2 and part in done.stderr and "set another SWEEP_DIR" in done.stderr


def test_a_trial_that_dies_leaves_its_last_line_and_the_others_go_on(tiny, command, tmp_path):
    arguments = [in_folder(tmp_path), "--gin.TRAIN_STEPS=20", "--gin.SEEDS=[0]", "--gin.RATES=[0.3]"]
    arguments.append(grid(INIT=["random"], EVAL_SPLIT=["validation[:64]", "absent"]))
    done = run(tiny, command, "--launcher=local", *arguments)
    assert done.returncode == 1
    failed, whole = trial_folders(tmp_path)
    assert (whole / "summary.json").exists() and (failed / "failed.txt").exists()
    status = run(tiny, command, "--status", *arguments).stdout
    assert "error: demo_reviews has no split 'absent'" in status
    assert status.splitlines()[-1] == "2 trials: 1 finished, 1 failed"


def test_a_sweep_that_is_killed_twice_ends_as_one_undisturbed(tiny, command, finished, tmp_path):
    arguments = [in_folder(tmp_path), "--launcher=local", "--gin.RATES=[0.3]"]
    rng = random.Random(0)
    for step in sorted(rng.sample(range(10, 50), 2)):
        process = subprocess.Popen(
            [*PROGRAM, *command, *arguments], env=os.environ | tiny.environment, cwd=tiny.folder,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.time() + 200
        while last_step(tmp_path) < step and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(tiny, command, *arguments).returncode == 0
    assert [path.name for path in trial_folders(tmp_path)] == [path.name for path in trial_folders(finished)]
    for folder in trial_folders(tmp_path):
        assert summary(folder) == summary(finished / folder.name)
        assert prompts(folder) == prompts(finished / folder.name)


def last_step(folder):
    """The newest step on record of any trial."""
    steps = [0]
    for path in folder.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except ValueError:
                continue
    return max(steps)


def test_several_processes_share_the_trials(tiny, command, finished, tmp_path):
    done = run(tiny, command, in_folder(tmp_path), "--launcher=local", "--gin.PROCESSES=2", "--gin.RATES=[0.3]")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "logs").glob("*.log"))) == 2
    for folder in trial_folders(tmp_path):
        assert summary(folder)["best_step"] == summary(finished / folder.name)["best_step"]
        one, other = (np.load(where / folder.name / "prompts" / "0.npy") for where in (tmp_path, finished))
        assert np.array_equal(one, other)


def test_submitit_runs_four_trials(tiny, command, tmp_path):
    arguments = [grid(INIT=["random"]), "--gin.SEEDS=[0, 1]", "--gin.TRAIN_STEPS=10", "--gin.VECTORIZE=False"]
    local = ["--launcher=slurm", "--gin.slurm.Slurm.cluster='local'", "--gin.SLURM={'timeout_min': 5}"]
    done = run(tiny, command, in_folder(tmp_path), *arguments, *local)
    assert done.returncode == 0, done.stderr
    found = [summary(folder) for folder in trial_folders(tmp_path)]
    assert [(one["seed"], one["steps"]) for one in found] == [(0, 10), (1, 10)] * 2


def test_kubernetes_gets_a_manifest_a_job(tiny, command, tmp_path):
    fields = {"image": "tuning:1", "claim": "sweeps", "accelerator": "v5e", "topology": "4x4"}
    arguments = [f"--gin.jobset.JobSet.{name}={value!r}" for name, value in fields.items()]
    # Relative: in the pods it lies in the volume.
    done = run(tiny, command, in_folder("runs/k8s"), "--launcher=jobset", "--gin.VECTORIZE=4", *arguments)
    assert done.returncode == 0, done.stderr
    manifests = sorted((tiny.folder / "runs" / "k8s" / "manifests").glob("*.yaml"))
    assert len(manifests) == 3  # 12 trials, four at a time
    (job,) = yaml.safe_load(manifests[0].read_text())["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["parallelism"] == 4  # hosts of four chips
    text = json.dumps(job)
    assert "--launcher=here" in text and text.count("RANDOM_SEED=") == 4


def test_a_launcher_whose_program_is_missing_says_what_to_install(tiny, command, tmp_path, monkeypatch):
    fields = {"cluster": "c", "tpu_type": "v5litepod-16", "docker_image": "i", "project": "p", "zone": "z"}
    arguments = [f"--gin.xpk.Xpk.{name}={value!r}" for name, value in fields.items()]
    monkeypatch.setenv("PATH", str(tmp_path))
    for launcher, part in (("xpk", "xpk"), ("slurm", "sbatch")):
        done = tiny.run([*command, in_folder("runs/none"), f"--launcher={launcher}", *arguments], "sweep")
        assert done.returncode == 2 and f"{part}" in done.stderr.splitlines()[-1], done.stderr

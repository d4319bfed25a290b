"""What a command line does before it is of use: imports, compilation, and that the loop keeps the device fed."""

import json
import os
import subprocess
import sys

import pytest

COMMANDS = ("train", "eval", "infer", "serve", "sweep", "convert", "neighbors", "demo")
# What takes long to import and is needed late, seldom, or only by a process of its own.
LATE = {"grain", "matplotlib", "orbax", "tensorboardX"}
ELSEWHERE = {*"pandas peft scipy seqio starlette submitit t5x tensorflow torch transformers huggingface_hub".split()}
STEPS, LOG_PERIOD = 12, 4

# `train`, watched: what is imported when its first step is taken; how many batches had been read while a step went on;
# how many steps had been dispatched when the host asked for a step's metrics; which programs were compiled.
WATCHED = """
import json, re, sys, time
import jax
import numpy as np

compiled = {"asked": 0, "found": 0}
EVENTS = {"/jax/compilation_cache/compile_requests_use_cache": "asked", "/jax/compilation_cache/cache_hits": "found"}

def count(event, **_):
    if event in EVENTS:
        compiled[EVENTS[event]] += 1

jax.monitoring.register_event_listener(count)
import importlib
train = importlib.import_module("prompt_tuning_jax.train")
from prompt_tuning_jax.batches.loader import PlannedBatches
from prompt_tuning_jax.training import loop

train_steps = int(re.search("TRAIN_STEPS=([0-9]+)", " ".join(sys.argv))[1])
dispatched, read, imported = 0, 0, []
asked, ahead = [], []

class OnDevice:
    def __init__(self, value, step):
        self.value, self.step = value, step

    def __array__(self, *arguments, **options):
        asked.append([self.step, dispatched])
        return np.asarray(self.value, *arguments, **options)

    def __float__(self):
        return float(self.__array__())

getitem = PlannedBatches.__getitem__

def get(self, number):
    global read
    read += self._shuffle  # those to train on
    return getitem(self, number)

PlannedBatches.__getitem__ = get
make = loop.make_train_step

def make_watched(*arguments, **options):
    step = make(*arguments, **options)

    def watched(*arguments):
        global dispatched
        dispatched += 1
        imported[:] = imported or sys.modules
        until = time.monotonic() + 20
        while read < min(dispatched + 1, train_steps) and time.monotonic() < until:
            time.sleep(0.001)
        ahead.append(read - dispatched)
        state, metrics = step(*arguments)
        return state, jax.tree.map(lambda value: OnDevice(value, dispatched), metrics)

    return watched

loop.make_train_step = make_watched
train.main()
print(json.dumps({"imported": imported, "asked": asked, "ahead": ahead, "compiled": compiled}))
"""


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """What was seen of two runs of one command, of which the first found no compiled program in the user's cache."""
    folder = tmp_path_factory.mktemp("startup")
    environment = os.environ | tiny.environment | {"XDG_CACHE_HOME": str(folder / "cache")}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    command = tiny.arguments(TRAIN_STEPS=STEPS, EVAL_PERIOD=STEPS, LOG_PERIOD=LOG_PERIOD, EVAL_SPLIT="validation[:32]")
    seen = []
    for name in ("first", "second"):
        arguments = [*command, f"--gin.MODEL_DIR={str(folder / name)!r}"]
        done = run(["-c", WATCHED, *arguments], env=environment, cwd=tiny.folder)
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    return seen


def run(python, **options):
    return subprocess.run([sys.executable, *python], capture_output=True, text=True, check=True, **options)


def test_no_command_line_imports_what_it_may_not_need():
    modules = ", ".join(f"prompt_tuning_jax.{name}" for name in COMMANDS)
    done = run(["-c", f"import sys, {modules}; print(*sys.modules)"])
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "jax" in imported
    assert imported & (LATE | ELSEWHERE) == set()


def test_the_list_of_tasks_asks_for_help_without_jax():
    code = "import runpy, sys; sys.argv = ['tasks', '--help']\n"
    code += "try: runpy.run_module('prompt_tuning_jax.tasks', run_name='__main__')\n"
    code += "except SystemExit: print(*sys.modules)"
    done = run(["-c", code])
    assert "usage" in done.stdout
    assert not {"jax", "flax"} & set(done.stdout.splitlines()[-1].split())


def test_the_first_step_waits_for_no_import_that_it_can_do_without(runs):
    imported = {name.partition(".")[0] for name in runs[0]["imported"]}
    assert imported & (LATE | ELSEWHERE) <= {"grain", "orbax"}  # Grain reads ahead, and imports Orbax


def test_a_second_run_compiles_nothing(runs):
    first, second = (seen["compiled"] for seen in runs)
    assert first["asked"] > first["found"]
    assert second == {"asked": first["asked"], "found": first["asked"]}


def test_no_step_is_waited_for_before_the_next_is_under_way(runs):
    """But where it is logged; and the loss of each is looked at."""
    earliest = {}
    for step, dispatched in runs[0]["asked"]:
        earliest.setdefault(step, dispatched)
    assert earliest == {step: step + bool(step % LOG_PERIOD) for step in range(1, STEPS + 1)}


def test_batches_are_read_ahead_of_the_step(runs):
    """While a step has not begun, the batch of the next is read; the last step has none."""
    assert len(runs[0]["ahead"]) == STEPS
    assert min(runs[0]["ahead"][:-1]) >= 1


def test_where_no_compiled_program_can_be_kept_nothing_is_said(tmp_path):
    (tmp_path / "file").touch()
    code = "import jax; from prompt_tuning_jax.compilation import keep_compiled_programs as keep; keep(); "
    code += "print(jax.jit(lambda x: x + 1)(1))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = run(["-W", "error", "-c", code], env=environment | {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert (done.stdout, done.stderr) == ("2\n", "")

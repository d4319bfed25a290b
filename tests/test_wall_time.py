"""The parts of a run's wall time against a clock that the test sets, and against sleeps in each part of a real run."""

import json
import threading
import time
import types

import jax
import optax
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.training import wall_time
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.run import Run
from prompt_tuning_jax.training.wall_time import PARTS, WallTime

pytestmark = pytest.mark.usefixtures("compiled_once")
ROWS = [{"inputs": f"film {i}", "targets": ["bad", "good"][i % 2]} for i in range(6)]
STEPS, EVALS = 4, 2


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: `clock.now` in seconds. By it, nothing was compiled before."""
    found = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(wall_time, "time", types.SimpleNamespace(perf_counter=lambda: found.now))
    monkeypatch.setattr(wall_time._compilation, "intervals", [])
    return found


def compiled(seconds: float) -> None:
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", seconds)


def test_each_second_is_in_one_part(clock):
    spent = WallTime()
    clock.now += 1
    with spent.part("stepping"):
        clock.now += 6
        with spent.part("evaluating"):
            clock.now += 3
            with pytest.raises(ZeroDivisionError), spent.part("saving"):
                clock.now += 4
                raise ZeroDivisionError
        clock.now += 2
    assert spent.split() == {
        "compiling": 0, "waiting_for_data": 0, "stepping": 8, "evaluating": 3, "saving": 4, "other": 1,
        "total": 16, "goodput": 0.5,
    }  # fmt: skip


def test_compilation_is_counted_once_and_not_under_the_part_around_it(clock):
    spent = WallTime()
    with spent.part("stepping"):
        clock.now += 2
        compiled(1)  # from 101 to 102
        clock.now += 4
        compiled(2)  # from 104 to 106
        clock.now += 1
        compiled(6.5)  # from 100.5 to 107, both of the above within it
        clock.now += 1
        compiled(0.5)  # from 107.5 to 108, after it
        other = threading.Thread(target=compiled, args=(3,))  # this thread did not wait for it
        other.start()
        other.join()
        jax.monitoring.record_event_duration_secs("/jax/checkpoint/write/async/blocking_duration_secs", 3)
    found = spent.split()
    assert (found["compiling"], found["stepping"], found["total"]) == (7, 1, 8)


def test_jax_reports_what_it_compiles():
    def slow_to_trace(x):
        time.sleep(0.3)
        return x + 1

    before = time.perf_counter()
    spent = WallTime()
    after = time.perf_counter()
    with spent.part("stepping"):
        jax.jit(slow_to_trace)(1.0)
    least = time.perf_counter() - after
    found = spent.split()
    assert least <= found["total"] <= time.perf_counter() - before
    assert 0.3 <= found["compiling"] <= found["total"] - found["stepping"]


@pytest.fixture
def train(model, tmp_path):
    """A function that trains a run in a folder, and returns the split in its summary."""

    def train() -> dict[str, float]:
        options = {"steps": STEPS, "batch_size": 2, "eval_every": STEPS // EVALS, "labels": ["bad", "good"]}
        method = pt.PromptTuning(3)
        result = pt.train(
            model, method, ROWS, ROWS, optimizer=optax.adamw(0.05), progress=False, folder=tmp_path / "run", **options
        )
        written = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert written["wall_time"] == result.summary["wall_time"]
        return result.summary["wall_time"]

    return train


def slowed(function, seconds):
    def slow(*args, **options):
        time.sleep(seconds)
        return function(*args, **options)

    return slow


def test_what_makes_a_run_slow_is_seen_in_its_summary(train, monkeypatch):
    """A batch, an evaluation and a save that sleep each show in their own part."""

    def slow_batches(self):
        return map(slowed(lambda batch: batch, 0.5), batches(self))

    batches = Run.remaining_batches
    monkeypatch.setattr(Run, "remaining_batches", slow_batches)
    monkeypatch.setattr(Evaluator, "metrics", slowed(Evaluator.metrics, 0.75))
    monkeypatch.setattr(Run, "_save", slowed(Run._save, 1.25))
    before = time.perf_counter()
    found = train()
    assert sum(found[part] for part in PARTS) == pytest.approx(found["total"], rel=1e-9)
    assert found["total"] <= time.perf_counter() - before
    assert found["waiting_for_data"] >= 0.5 * STEPS
    assert found["evaluating"] >= 0.75 * EVALS
    assert found["saving"] >= 1.25 * EVALS
    assert min(found.values()) >= 0 and found["stepping"] > 0 and found["compiling"] > 0
    assert found["goodput"] == found["stepping"] / found["total"]

    monkeypatch.undo()
    again = train()  # it is finished: only read, and written anew
    assert again["stepping"] == again["evaluating"] == again["waiting_for_data"] == 0 < again["other"]

"""Trials in one program equal the same runs alone: their prompts, their records, their summaries."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CONFIG, LENGTHS, PROMPT_LENGTH

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.checkpoints.base import open_model
from prompt_tuning_jax.methods.method import Injection
from prompt_tuning_jax.methods.model_tuning import ModelTuning
from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
from prompt_tuning_jax.prompts.initializers import ClassLabels, RandomUniform, SampledVocabulary
from prompt_tuning_jax.sweep import shared_key
from prompt_tuning_jax.sweeps import run_groups as programs_module
from prompt_tuning_jax.sweeps.run_groups import padding, programs, runs_per_pass
from prompt_tuning_jax.sweeps.shared_step import program_key
from prompt_tuning_jax.sweeps.vectorized import train_together
from prompt_tuning_jax.training.loop import program_size, train
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.progress import Stopped
from prompt_tuning_jax.training.run import Run, TrainConfig

STEPS = 50
RANDOM = RandomUniform()
TIMES = {"seconds", "examples_per_second", "wall_time"}


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def settings(tiny):
    """Of one run; `with_dropout` and the rest of the arguments make it another."""

    def make(folder, dropout=0.1, length=PROMPT_LENGTH, rate=0.3, lengths=LENGTHS, start=RANDOM, **other):
        data = functools.partial(
            DatasetConfig, "demo_reviews", task_feature_lengths=lengths, cache_dir=str(tiny.folder / "cache")
        )
        chosen = {
            "initial_checkpoint_path": str(tiny.base),
            "train_dataset": data(split="train", batch_size=8),
            "eval_dataset": data(split="validation[:64]", batch_size=32),
            "train_steps": STEPS,
            "eval_period": 25,
            "log_period": 10,
        }
        return TrainConfig(
            model_dir=str(folder),
            size=dataclasses.replace(CONFIG, dropout_rate=dropout),
            method=PromptTuning(length, start),
            optimizer=adafactor(rate),
            **(chosen | other),
        )

    return make


def records(folder):
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def summary(folder):
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def assert_same_bits(together, alone):
    """What one pass a run must give: the same products in the same order."""
    names = [path.relative_to(alone) for path in alone.rglob("*.npy")]
    assert names and all((together / name).read_bytes() == (alone / name).read_bytes() for name in names)
    assert summary(together) == summary(alone)
    assert records(together) == records(alone)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_seeds_learning_rates_and_initialisations_are_trained_as_alone(settings, tmp_path, dropout):
    inits = [RANDOM, SampledVocabulary(), ClassLabels(["negative", "positive"])]
    runs = {
        f"{seed}": {"random_seed": seed, "rate": rate, "start": inits[seed % 3], "dropout": dropout}
        for seed, rate in enumerate([0.3, 0.1, 0.03, 0.5])
    }
    assert not train_together((name, settings(tmp_path / name, **run)) for name, run in runs.items())
    for name, run in runs.items():
        train(settings(tmp_path / "alone" / name, **run))
        assert_same_bits(tmp_path / name, tmp_path / "alone" / name)
    prompts = [np.load(tmp_path / name / "prompts" / f"{STEPS}.npy") for name in runs]
    assert all(np.abs(one - other).max() > 0.1 for one, other in zip(prompts, prompts[1:], strict=False))


def test_runs_that_share_a_pass_on_a_trained_base_stay_as_alone(tmp_path):
    """Fifty steps with dropout on the embedded base. (On random weights training is chaotic: a last bit doubles at each
    step, whoever takes the sums in another order.)"""
    config = dataclasses.replace(open_model("nano").config, dropout_rate=0.1)
    data = functools.partial(DatasetConfig, "demo_reviews", task_feature_lengths={"inputs": 24, "targets": 8})

    def run(folder, seed, rate):
        return TrainConfig(
            model_dir=str(folder), size=config, initial_checkpoint_path="nano",
            train_dataset=data(split="train", batch_size=8, buckets=(24,)),
            eval_dataset=data(split="validation[:32]", batch_size=32, buckets=(24,)),
            optimizer=adafactor(rate), train_steps=STEPS, eval_period=25,
            method=PromptTuning(8, ClassLabels(["negative", "positive"])),
            random_seed=seed,
        )  # fmt: skip

    runs = {str(seed): (seed, rate) for seed, rate in enumerate([0.3, 0.1, 0.03])}
    assert not train_together(((name, run(tmp_path / name, *own)) for name, own in runs.items()), most=3)
    for name, own in runs.items():
        train(run(tmp_path / "alone" / name, *own))
        one, other = (np.load(tmp_path / where / name / "prompts" / f"{STEPS}.npy") for where in ("", "alone"))
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()
        assert summary(tmp_path / name) == summary(tmp_path / "alone" / name)


@pytest.mark.parametrize("most", [None, 2, 3])
def test_prompts_and_inputs_of_different_lengths_are_trained_as_alone(settings, tmp_path, monkeypatch, most):
    monkeypatch.setattr(programs_module, "MOST_PADDING_ON_CPU", 9.0)
    steps = {"train_steps": 4, "eval_period": 2, "dropout": 0.0, "rate": 0.03}  # few, on random weights: see above
    runs = {
        "short": steps | {"length": 2},
        "long": steps | {"length": 9, "random_seed": 1},
        "cut": steps | {"length": 5, "random_seed": 2, "lengths": {"inputs": 20, "targets": 8}},
    }
    assert not train_together(((name, settings(tmp_path / name, **run)) for name, run in runs.items()), most=most)
    for name, run in runs.items():
        train(settings(tmp_path / "alone" / name, **run))
        for step in (2, 4):
            one, other = (np.load(tmp_path / where / name / "prompts" / f"{step}.npy") for where in ("", "alone"))
            assert one.shape == (run["length"], CONFIG.emb_dim)
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_inputs_of_different_lengths_draw_the_same_dropout(settings, tmp_path):
    steps = {"train_steps": 4, "eval_period": 4, "rate": 0.03}
    runs = {"long": steps, "cut": steps | {"random_seed": 2, "lengths": {"inputs": 20, "targets": 8}}}
    assert not train_together(((name, settings(tmp_path / name, **run)) for name, run in runs.items()), most=2)
    train(settings(tmp_path / "alone", **runs["cut"]))
    one, other = (np.load(tmp_path / where / "prompts" / "4.npy") for where in ("cut", "alone"))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_a_run_that_ends_early_leaves_and_the_others_go_on(settings, tmp_path, capsys):
    runs = {
        "short": {"train_steps": 25},
        "still": {"random_seed": 1, "rate": 1e-9, "early_stop_evals": 1, "eval_period": 5, "train_steps": 25},
        "whole": {"random_seed": 2},
    }
    assert not train_together((name, settings(tmp_path / name, **run)) for name, run in runs.items())
    assert summary(tmp_path / "short")["steps"] == 25
    assert summary(tmp_path / "still")["stopped_early"] and summary(tmp_path / "still")["steps"] == 10
    lines = capsys.readouterr().err.splitlines()
    ends = [next(n for n, line in enumerate(lines) if line.startswith(f"{name}: best at step")) for name in runs]
    steps = [next(n for n, line in enumerate(lines) if f"whole: step {step} train" in line) for step in (20, 30, 50)]
    assert ends[1] < steps[0] < ends[0] < steps[1] < steps[2] < ends[2], "each is reported when it ends"
    train(settings(tmp_path / "alone", **runs["whole"]))
    assert_same_bits(tmp_path / "whole", tmp_path / "alone")


def test_a_run_that_fails_leaves_its_reason_and_the_others_go_on(settings, tmp_path):
    def broken(key, length, model):
        return jax.numpy.full((length, model.config.emb_dim), np.nan)

    (tmp_path / "file").write_text("no folder")
    runs = {
        "nan": {"start": broken},
        "whole": {"random_seed": 2},
        "file": {"random_seed": 3},
    }
    failures = train_together((name, settings(tmp_path / name, **run)) for name, run in runs.items())
    assert set(failures) == {"nan", "file"}
    assert "the loss is nan at step 1" in failures["nan"]
    assert (tmp_path / "nan" / "failed.txt").read_text() == f"error: {failures['nan']}\n"
    assert not (tmp_path / "nan" / "summary.json").exists()
    train(settings(tmp_path / "alone", **runs["whole"]))
    assert_same_bits(tmp_path / "whole", tmp_path / "alone")


@pytest.mark.parametrize("start", [train, lambda config: train_together([("a", config)])])
def test_a_run_whose_frozen_parameters_changed_does_not_count_as_finished(settings, tmp_path, monkeypatch, start):
    after_step = Run.after_step

    def changing(run, *arguments):
        name = next(iter(run.frozen))
        run.frozen[name] = run.frozen[name] * 2
        after_step(run, *arguments)

    monkeypatch.setattr(Run, "after_step", changing)
    with pytest.raises(RuntimeError, match="the frozen parameters changed in memory"):
        start(settings(tmp_path / "a", train_steps=2, eval_period=2))
    assert (tmp_path / "a" / "metrics.jsonl").exists() and not (tmp_path / "a" / "summary.json").exists()


def test_runs_killed_while_they_are_saved_go_back_to_one_step(settings, tmp_path):
    runs = {str(seed): {"random_seed": seed} for seed in range(2)}
    named = {where: [(name, settings(tmp_path / where / name, **run)) for name, run in runs.items()] for where in "ab"}
    for configs in named.values():
        assert not train_together(configs)
    for name in ("summary.json", "prompts/50.npy"):
        (tmp_path / "b" / "0" / name).unlink()
    # "1" is as if it had been killed before its last checkpoint was whole.
    for path in [*(tmp_path / "b" / "1").glob("checkpoints/50"), tmp_path / "b" / "1" / "summary.json"]:
        path.rename(tmp_path / f"gone-{path.name}")
    assert not train_together(named["b"])
    for name in runs:
        for path in ("prompts/50.npy", "best/prompt.npy"):
            assert (tmp_path / "a" / name / path).read_bytes() == (tmp_path / "b" / name / path).read_bytes()
        assert summary(tmp_path / "a" / name) == summary(tmp_path / "b" / name)
        assert records(tmp_path / "a" / name) == records(tmp_path / "b" / name)


def test_runs_that_are_stopped_together_go_on_as_if_they_had_not_been(settings, tmp_path):
    runs = {"short": {"train_steps": 20}, "whole": {"random_seed": 1, "rate": 0.1}}
    whole = [(name, settings(tmp_path / "whole" / name, **run)) for name, run in runs.items()]
    assert not train_together(whole)
    stopped = [(name, settings(tmp_path / "stopped" / name, **run)) for name, run in runs.items()]
    for number, step in enumerate((13, 38)):
        with pytest.raises(Stopped, match=f"saved at step {step}"):
            train_together(stopped, stop=lambda taken, step=step: taken >= step)
        assert [(tmp_path / "stopped" / name / "summary.json").exists() for name in runs] == [number == 1, False]
    assert not train_together(stopped)
    for name in runs:
        one, other = tmp_path / "whole" / name, tmp_path / "stopped" / name
        for path in one.rglob("*.npy"):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()
        assert summary(one) == summary(other)
        assert [row for row in records(one) if row["split"] == "eval"] == [
            row for row in records(other) if row["split"] == "eval"
        ]


def test_more_steps_for_runs_that_share_a_program(settings, tmp_path, capsys):
    runs = {str(seed): {"random_seed": seed} for seed in range(2)}
    for steps in (25, STEPS):
        configs = [(name, settings(tmp_path / name, train_steps=steps, **run)) for name, run in runs.items()]
        assert not train_together(configs)
    lines = capsys.readouterr().err.splitlines()
    for name, run in runs.items():
        train(settings(tmp_path / "alone" / name, **run))
        assert_same_bits(tmp_path / name, tmp_path / "alone" / name)
        assert any(f"{name}: {tmp_path / name} is extended from 25 to 50 steps" in line for line in lines)


def test_what_cannot_share_a_program_has_another_key(settings, tmp_path):
    key = program_key(settings(tmp_path))
    assert key is not None
    other = {"random_seed": 5, "rate": 0.1, "start": SampledVocabulary(), "train_steps": 7, "eval_period": 3}
    assert program_key(settings(tmp_path, **other, lengths={"inputs": 20, "targets": 4})) == key
    assert program_key(settings(tmp_path, length=7)) != key  # dropout's bits are drawn by position
    assert program_key(settings(tmp_path, length=7, dropout=0.0)) == program_key(settings(tmp_path, dropout=0.0)) != key
    assert program_key(settings(tmp_path, z_loss=0.0)) != key
    whole = dataclasses.replace(settings(tmp_path), method=ModelTuning())
    streamed = dataclasses.replace(settings(tmp_path).train_dataset, use_cached=False)
    assert program_key(whole) not in (None, key)
    assert shared_key(whole, "auto") is None and shared_key(whole, 2) == program_key(whole), (
        "many whole models in memory"
    )
    assert shared_key(settings(tmp_path), "auto") == key
    assert program_key(settings(tmp_path, initial_checkpoint_path=None)) is None
    assert program_key(settings(tmp_path, train_dataset=streamed)) is None


@given(st.integers(1, 3_000))
def test_a_program_keeps_at_most_half_as_many_places_again_as_it_has_runs(active):
    size = program_size(active)
    assert active <= size < 1.5 * active + 1
    assert program_size(size) == size


class Planned(Run):
    """What `programs` asks of a run: its prompt's length and its batches' widths."""

    def __init__(self, length, widths):
        self._start = Injection(prompt=np.zeros((length, 1)))
        self.batches = SimpleNamespace(shapes=lambda count: [(widths[n % len(widths)], 8) for n in range(count)])


def test_runs_that_would_pad_each_other_much_do_not_share_a_program():
    same = [Planned(20, [16, 32, 24]) for _ in range(3)]
    wide, prompted = Planned(20, [96, 128]), Planned(100, [16, 32, 24])
    found = list(programs([*same, wide, prompted]))
    assert [set(program.runs) for program in found] == [set(same), {prompted}, {wide}]
    assert all(program.at_once == 1 for program in found)  # on CPU
    (whole,) = programs([*same, wide, prompted], 2)
    assert len(whole.runs) == 5 and whole.at_once == 2
    shapes = {run: np.array(run.batches.shapes(4)) for run in (same[0], wide)}
    # A prompt of 20 and the inputs, step by step: both as wide as the wider, over each as wide as it is.
    alone = (36 + 52 + 44 + 36) + (116 + 148 + 116 + 148)
    assert padding([same[0], wide], shapes) == pytest.approx(2 * (116 + 148 + 116 + 148) / alone)


def test_runs_that_do_not_fit_into_memory_take_turns(monkeypatch, capsys):
    runs = [Planned(20, [16]) for _ in range(8)]
    monkeypatch.setattr(programs_module, "free_bytes", lambda: 1_000)
    monkeypatch.setattr(programs_module, "step_bytes", lambda runs, widest: 250 * len(runs))
    assert runs_per_pass(runs, [16, 8]) == 3  # of 900 bytes
    assert "8 runs at once take 0.0 GiB" in capsys.readouterr().err
    assert runs_per_pass(runs[:3], [16, 8]) == 3
    monkeypatch.setattr(programs_module, "step_bytes", lambda runs, widest: 2_000 * len(runs))
    assert runs_per_pass(runs, [16, 8]) == 1

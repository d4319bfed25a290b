"""Methods of one prompt per task: their formulas, and how a batch of several tasks is trained, evaluated and kept."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, ROOT

import prompt_tuning_jax as pt
from prompt_tuning_jax import neighbors
from prompt_tuning_jax.batches.data import dataset_of
from prompt_tuning_jax.batches.loader import Batch, MixedBatches
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.errors import SettingError
from prompt_tuning_jax.inference.bank import PromptBank
from prompt_tuning_jax.inference.folder import PromptFolder
from prompt_tuning_jax.methods.mpt import MPT
from prompt_tuning_jax.methods.multitask_prompt import COMBINES, MultitaskPrompt
from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
from prompt_tuning_jax.methods.shapes import check_injection
from prompt_tuning_jax.prompts.files import read_prompt
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.run import Run, TrainConfig, start_state
from prompt_tuning_jax.training.step import batch_loss, make_train_step

TASKS = ("sst2", "cola", "mrpc")  # not in the order of their names
D = CONFIG.emb_dim
ROWS = {
    "sst2": [{"inputs": f"a {word} film", "targets": target} for word, target in (("fine", "good"), ("dull", "bad"))],
    "cola": [{"inputs": "it was awful", "targets": "good"}],
    "mrpc": [{"inputs": f"the cast is {word}", "targets": "bad"} for word in ("odd", "great", "good")],
}
OPTIONS = {"steps": 4, "eval_every": 2, "batch_size": 4, "metrics": [], "progress": False}
OPTIONS |= {"optimizer": optax.adamw(0.05), "lengths": {"inputs": 16, "targets": 8}}


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A run's result, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return pt.train(model, pt.MPT(length=3), ROWS, ROWS, folder=folder, **OPTIONS), folder


def away(method, model):
    """The method's parameters away from their start, where a wrong formula would not show."""
    rng = np.random.default_rng(2)
    start = method.init(jax.random.key(1), model)
    return {name: value + rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}


@pytest.mark.parametrize("rank", [1, 2])
def test_mpt_is_pefts_with_the_same_weights(rank, model):
    pytest.importorskip("torch").set_num_threads(1)
    import torch

    peft = pytest.importorskip("peft")
    from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

    method = MPT(TASKS, length=4, rank=rank)
    values = away(method, model)
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_transformer_submodules=1, token_dim=D,
        num_tasks=len(TASKS), num_ranks=rank,
    )  # fmt: skip
    theirs = MultitaskPromptEmbedding(config, None)
    names = {"embedding.weight": "prompt", "prefix_task_cols": "columns", "prefix_task_rows": "rows"}
    theirs.load_state_dict({name: torch.tensor(np.asarray(values[ours])) for name, ours in names.items()})
    found = method.apply(values, {}).task_prompts
    with torch.no_grad():
        for number, task in enumerate(TASKS):
            expected = theirs(torch.arange(4)[None], torch.tensor([number]))[0].numpy()
            np.testing.assert_allclose(found[task], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_every_task_of_mpt_starts_from_the_shared_prompt(rank, model):
    """Unlike PEFT's, whose two factors start near 0. Ranks above the first are told apart from the first step on."""
    method = MPT(TASKS, length=4, rank=rank)
    start = method.init(jax.random.key(0), model)
    for prompt in method.apply(start, {}).task_prompts.values():
        np.testing.assert_array_equal(prompt, start["prompt"])
    gradient = jax.grad(lambda values: sum(jnp.sum(p**2) for p in method.apply(values, {}).task_prompts.values()))
    rows = np.asarray(gradient(start)["rows"])
    assert all(np.abs(rows[:, i] - rows[:, j]).max() > 1e-3 for i in range(rank) for j in range(i))


def combined(combine, shared, own, width):
    """The official four ways, written out with loops (extended/multitask_prompts.py)."""
    if combine == "concatenate":
        return np.array([*shared, *(own[at : at + width] for at in range(0, len(own), width))])
    if combine == "project":
        features = shared.shape[1]
        kernel, bias = own[: width * features], own[width * features :]
        return np.array(
            [[sum(kernel[out * features + i] * row[i] for i in range(features)) + bias[out] for out in range(width)]
             for row in shared]
        )  # fmt: skip
    rest = len(own) // len(shared)
    parts = [own[at * rest : (at + 1) * rest] for at in range(len(shared))]
    if combine == "add":
        return np.array([row + part for row, part in zip(shared, parts, strict=True)])
    return np.array([[*row, *part] for row, part in zip(shared, parts, strict=True)])


@pytest.mark.parametrize(
    ("combine", "options", "shapes", "positions"),
    [
        ("add", {}, ((4, D), (3, 4 * D)), 4),
        ("concatenate", {}, ((4, D), (3, 4 * D)), 8),
        ("concatenate", {"task_length": 2}, ((4, D), (3, 2 * D)), 6),
        ("concatenate_features", {}, ((4, D // 2), (3, 4 * D // 2)), 4),
        ("concatenate_features", {"shared_features": 5}, ((4, 5), (3, 4 * (D - 5))), 4),
        ("project", {}, ((4, D), (3, D * D + D)), 4),
        ("project", {"shared_features": 5}, ((4, 5), (3, 5 * D + D)), 4),
    ],
)
def test_the_official_four_ways(combine, options, shapes, positions, model):
    method = MultitaskPrompt(TASKS, 4, combine, **options)
    method.check(CONFIG, 16)
    start = method.init(jax.random.key(0), model)
    assert (start["shared"].shape, start["tasks"].shape) == shapes
    for value in start.values():
        assert 0 <= value.min() < 0.1 and 0.4 < value.max() < 0.5, "uniform over [0, 0.5)"
    values = away(method, model)
    injection = method.apply(values, {})
    check_injection(method, injection, CONFIG, model.parameters)
    assert injection.length == positions
    shared, own = (np.asarray(values[name], np.float64) for name in ("shared", "tasks"))
    for number, task in enumerate(TASKS):
        expected = combined(combine, shared, own[number], D)
        np.testing.assert_allclose(injection.task_prompts[task], expected, atol=1e-5)  # sums of up to 17 products


def test_no_way_is_left_out():
    assert {"add", "concatenate", "concatenate_features", "project"} == {*COMBINES}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_on_a_mixed_batch_is_each_row_with_its_own_tasks_prompt(micro_batches, model):
    """The loss and the gradient are the sums over rows that pass through the model alone."""
    method, network = MPT(TASKS, length=3), Transformer(dataclasses.replace(model.config, dropout_rate=0.0))
    values, frozen = away(method, model), dict(model.parameters)
    rng = np.random.default_rng(0)
    inputs, targets = (rng.integers(3, 300, (4, width)).astype(np.int32) for width in (6, 3))
    names = ["mrpc", "sst2", "mrpc", "cola"]
    tasks = np.array([sorted(TASKS).index(name) for name in names], np.int32)

    def one_by_one(values):
        injection = method.apply(values, frozen)
        rows = zip(names, jnp.asarray(inputs), jnp.asarray(targets), strict=True)
        return sum(batch_loss(network, injection.of_task(name), frozen, x[None], y[None]).loss for name, x, y in rows)

    loss, gradients = jax.jit(jax.value_and_grad(one_by_one))(values)
    step = make_train_step(network, method, optax.sgd(1.0), num_microbatches=micro_batches)
    state = start_state(values, optax.sgd(1.0), 0)
    after, metrics = step(state, frozen, Batch(inputs, targets, np.arange(4, dtype=np.int32), tasks))
    np.testing.assert_allclose(metrics.sums.loss, loss, rtol=1e-5)
    for name, value in values.items():
        scale = np.abs(gradients[name]).max()
        np.testing.assert_allclose(value - after.trainable[name], gradients[name], atol=2e-5 * scale)


def test_batches_tell_their_rows_tasks_to_methods_that_ask(model):
    """Any other run's batches, and so its program, are what they are without tasks."""

    def run(method):
        data = dataset_of(ROWS, "train", batch_size=4, lengths=OPTIONS["lengths"], metrics=[])
        settings = {"size": model.config, "initial_checkpoint_path": model.path, "model": model, "train_steps": 3}
        settings |= {"eval_period": 3, "optimizer": optax.sgd(0.1), "train_dataset": data, "eval_dataset": data}
        config = TrainConfig(method=method, **settings)
        return Run(config, config.open_folder(), model)

    asking = run(MPT(TASKS, 3))
    assert isinstance(asking.batches, MixedBatches)
    words = model.tokenizer
    of_inputs = {tuple(words.encode(row["inputs"])): task for task, rows in ROWS.items() for row in rows}
    for batch in asking.remaining_batches():
        for inputs, task in zip(batch.inputs, batch.tasks, strict=True):
            tokens = tuple(int(token) for token in inputs if token > 1)
            assert sorted(TASKS)[task] == of_inputs[tokens]
    assert all(batch.tasks is None for batch in run(PromptTuning(3)).remaining_batches())


def test_tasks_are_drawn_in_proportion_to_their_rows(model):
    data = dataset_of(ROWS, "train", batch_size=4, lengths=OPTIONS["lengths"])
    batches = data.batches(model.tokenizer)
    assert {name: part.rate for name, part in batches.parts.items()} == {"sst2": 2.0, "cola": 1.0, "mrpc": 3.0}


def test_each_task_is_evaluated_with_its_own_prompt(trained, model):
    result, _ = trained
    assert {*result.prompts} == {*TASKS} and len({prompt.tobytes() for prompt in result.prompts.values()}) == 3
    loss_of = jax.jit(functools.partial(batch_loss, Transformer(dataclasses.replace(model.config, dropout_rate=0.0))))
    for task, prompt in result.prompts.items():
        data = dataset_of(ROWS[task], "validation", batch_size=4, lengths=OPTIONS["lengths"], metrics=[])
        (batch,) = [batches[0] for batches in data.eval_batches(model.tokenizer).values()]
        own = pt.Injection(prompt=jnp.asarray(prompt))
        sums = loss_of(own, dict(model.parameters), batch.inputs, batch.targets)
        assert result.metrics[f"{task}/loss"] == pytest.approx(float(sums.loss / sums.tokens), rel=1e-5)
    assert len({value for name, value in result.metrics.items() if name.endswith("/loss")}) == 3


def test_a_result_of_several_prompts_says_so(trained, tmp_path):
    result, _ = trained
    with pytest.raises(ValueError, match="there is a prompt for each of cola, mrpc, sst2: take `prompts`, by task"):
        _ = result.prompt
    result.save(tmp_path / "saved")
    for task, prompt in result.prompts.items():
        np.testing.assert_array_equal(np.load(tmp_path / "saved" / f"{task}.npy"), prompt)


def test_a_runs_folder_has_a_prompt_for_each_task(trained, model):
    """Files that everything which reads a prompt can read, and whose base is checked."""
    result, folder = trained
    assert {path.stem for path in (folder / "best" / "prompts").iterdir()} == {*TASKS}
    assert {path.name for path in (folder / "prompts").iterdir()} == {"0", "2", "4"}
    for task, prompt in result.prompts.items():
        np.testing.assert_array_equal(read_prompt(folder / "best" / "prompts" / f"{task}.npy"), prompt)
        np.testing.assert_array_equal(injection_of(folder, CONFIG).task_prompts[task], prompt)
    with pytest.raises(SettingError, match="is a run with a prompt for each of cola, mrpc, sst2: set `prompt` to one"):
        read_prompt(folder)
    changes = PromptFolder(folder).sync(PromptBank(D, "0" * 16))
    assert {*changes.broken} == {*TASKS} and "was trained on a base of fingerprint" in str(changes.broken["sst2"])


def test_the_tasks_prompts_answer_side_by_side(trained, model):
    result, folder = trained
    asked = [{"prompt": task, "inputs": "a fine film"} for task in TASKS]
    of_folder = [*pt.Predictor(model, folder, max_new_tokens=4).predict(asked)]
    of_result = [*pt.Predictor(model, result.prompts, max_new_tokens=4).predict(asked)]
    assert of_folder == of_result and len({answer["score"] for answer in of_folder}) == 3
    with pytest.raises(SettingError, match="has 'all', which is a prompt for each of cola, mrpc, sst2: give these by"):
        pt.Predictor(model, {"all": result})


def test_evaluate_takes_each_tasks_own_prompt(trained, model):
    result, folder = trained
    rows = {task: [{"inputs": row["inputs"], "targets": row["targets"]} for row in ROWS[task]] for task in TASKS}
    labels = {"sst2": ["good", "bad"], "cola": ["good", "bad"], "mrpc": ["bad", "good"]}
    found = pt.evaluate(model, rows, prompt=result, labels=labels)
    assert found == pt.evaluate(model, rows, prompt=folder, labels=labels)
    assert found == pt.evaluate(model, rows, prompt=result.prompts, labels=labels)
    for task in TASKS:
        alone = pt.evaluate(model, rows[task], prompt=result.prompts[task], labels=labels[task])
        assert found["tasks"][task] == alone
    with pytest.raises(SettingError, match="a prompt for each of cola, mrpc, sst2, but none for rows: set `prompt`"):
        pt.evaluate(model, rows["sst2"], prompt=result, labels=labels["sst2"])


def test_neighbors_compares_the_tasks(trained, tiny, monkeypatch, capsys):
    result, folder = trained
    monkeypatch.setattr(sys, "argv", ["neighbors", str(folder), f"--base={tiny.base}", "--json"])
    neighbors.main()
    report = json.loads(capsys.readouterr().out)
    assert [*report["prompts"]] == [f"{folder}/{task}" for task in sorted(TASKS)]
    means = [result.prompts[task].mean(axis=0) for task in sorted(TASKS)]
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in means] for a in means]
    np.testing.assert_allclose(report["mean_vector_similarity"], expected, atol=1e-6)


def train(model, method, rows=ROWS, validation=None, **options):
    return pt.train(model, method, rows, rows if validation is None else validation, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("call", "setting", "message"),
    [
        (lambda model: train(model, pt.MPT(length=3), ROWS["sst2"]), "tasks", "has one task, 'rows', expected the tas"),
        (
            lambda model: train(model, pt.MPT(TASKS, 3), ROWS["sst2"]),
            "tasks",
            "`tasks` has cola, mrpc, sst2, with a prompt each, but rows is one task: set `name` to the mixture of th",
        ),
        (
            lambda model: train(model, pt.MPT(("sst2", "rte"), 3)),
            "tasks",
            "`tasks` has rte, sst2, but the training data has the tasks sst2, cola, mrpc: set `tasks` to these",
        ),
        (
            lambda model: train(model, pt.MPT(length=3), validation=ROWS | {"rte": ROWS["cola"]}),
            "eval_split",
            "`validation` has the task rte, which has no prompt: `tasks` has cola, mrpc, sst2",
        ),
        (
            lambda model: train(model, pt.MPT(length=3), metrics=None, labels={"sst2": ["good", "bad"]}),
            "labels",
            "`labels` has nothing for the task cola: set it to None there if it has none",
        ),
        (
            lambda model: train(model, pt.MPT(length=3), ROWS | {"cola": [{"inputs": "it"}]}),
            "train",
            "task cola: `train`, row 0 has no 'targets'",
        ),
        (
            lambda model: train(model, pt.MPT(length=3), ROWS["sst2"], metrics={"sst2": []}),
            "metrics",
            "`metrics` is a mapping by task, but `train` is a single task: give `metrics` as one list",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_setting(call, setting, message, model):
    with pytest.raises(SettingError, match=message) as refused:
        call(model)
    assert "\n" not in str(refused.value) and refused.value.setting == setting


ON_MESH = """
import json, sys
import jax, numpy as np
sys.path.insert(0, {tests!r})
import prompt_tuning_jax as pt
from test_multitask import OPTIONS, ROWS
result = pt.train(pt.load({base!r}), pt.MPT(length=3), ROWS, ROWS, **OPTIONS, **json.loads(sys.argv[1]))
np.savez({out!r}, **result.prompts)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "model": 2}], ids=str)
def test_prompts_per_task_are_the_same_on_a_mesh(mesh, trained, tiny, tmp_path):
    """Each device has its own rows of a batch, and with them their tasks."""
    result, _ = trained
    program = ON_MESH.format(tests=str(ROOT / "tests"), base=str(tiny.base), out=str(tmp_path / "prompts.npz"))
    environment = os.environ | tiny.environment
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    settings = json.dumps({"mesh": mesh})
    done = subprocess.run(
        [sys.executable, "-c", program, settings], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "prompts.npz")
    assert {*found} == {*TASKS}
    for task, prompt in result.prompts.items():
        np.testing.assert_allclose(found[task], prompt, rtol=0, atol=1e-5)

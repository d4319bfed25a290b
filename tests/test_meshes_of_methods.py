"""Every method, and a tuned model, is trained on a mesh as on one device; and what its steps send between devices."""

import json
import shutil

import gin
import jax
import numpy as np
import pytest
from groups import HERE, MESHES, STEPS, ends, half_way, many_trainings, settings, start_group
from tiny import CONFIG, PROMPT_LENGTH

from experiments import scaling
from experiments.sizes import SIZES
from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base
from prompt_tuning_jax.checkpoints.model import load
from prompt_tuning_jax.checkpoints.state import StateStore
from prompt_tuning_jax.checkpoints.tuned import read_tuned
from prompt_tuning_jax.gin_files import parse
from prompt_tuning_jax.training.run import TrainConfig, start_state

SHORT_PROMPT = {"PROMPT_LENGTH": PROMPT_LENGTH}
RANDOM = "prompts/random_uniform.gin"
METHODS = {
    "ResidualPrompt": {"files": (RANDOM, "methods/residual_prompt.gin"), "BOTTLENECK": 6} | SHORT_PROMPT,
    "PerLayerPrompt": {"files": (RANDOM, "methods/per_layer_prompt.gin")} | SHORT_PROMPT,
    "PrefixTuning": {"files": ("methods/prefix_tuning.gin",)} | SHORT_PROMPT,
    "LoRA": {"files": ("methods/lora.gin",), "RANK": 2},
    "IA3": {"files": ("methods/ia3.gin",)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


def train_methods(tiny, folder, where, mesh, processes, devices):
    """Trains each method on a mesh, in a folder that is named after both."""
    runs = {folder / f"{name}-{where}": macros | mesh for name, macros in METHODS.items()}
    many_trainings(tiny, runs, processes, devices)


@pytest.fixture(scope="module")
def methods_alone(tiny, folder):
    train_methods(tiny, folder, "alone", {}, 1, 1)


@pytest.fixture(scope="module")
def methods_data(tiny, folder, methods_alone):
    train_methods(tiny, folder, "data", MESHES["data"], 1, 8)


@pytest.fixture(scope="module")
def methods_mixed(tiny, folder, methods_alone):
    train_methods(tiny, folder, "mixed", MESHES["mixed"], 1, 8)


@pytest.fixture(scope="module")
def methods_changed(tiny, folder, methods_mixed):
    """Each method's run goes on from half-way, on another mesh and by two processes."""
    for name in METHODS:
        half_way(folder / f"{name}-mixed", folder / f"{name}-changed")
    train_methods(tiny, folder, "changed", MESHES["fsdp"], 2, 4)


def first_and_last(tiny, folder, macros):
    """What a finished run trains, as it started and as it ended."""
    with gin.unlock_config():
        gin.clear_config()
        parse(settings(tiny, folder, **macros))
        config = gin.get_configurable(TrainConfig)()
        gin.clear_config()
    trained = config.method.init(jax.random.fold_in(jax.random.key(config.random_seed), 1), load(str(tiny.base)))
    start = start_state(trained, config.optimizer, config.random_seed)
    store = StateStore(folder / "checkpoints")
    end = store.restore(STEPS, start)
    store.close()
    return start.trainable, end.trainable


@pytest.mark.slow
@pytest.mark.parametrize("where", ["data", "mixed", "changed"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_on_any_mesh(request, tiny, folder, name, where):
    """What it trained, and what is left as its best evaluation; dropout is on."""
    request.getfixturevalue(f"methods_{where}")
    one, many = folder / f"{name}-alone", folder / f"{name}-{where}"
    start, expected = first_and_last(tiny, one, METHODS[name])
    _, found = first_and_last(tiny, many, METHODS[name])
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert np.abs(value - start[path]).max() > 0.05, path
        np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5, err_msg=path)
    if where != "changed":  # whose best evaluation was taken away with its second half
        saved, of_one = (read_tuned(run / "best", CONFIG) for run in (many, one))
        assert jax.tree.structure(saved) == jax.tree.structure(of_one)
        for ours, theirs in zip(jax.tree.leaves(saved), jax.tree.leaves(of_one), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_tuned_model_is_the_same_on_any_mesh(tiny, folder):
    """Its parameters and their optimiser's state are divided, and are saved and restored onto another mesh."""
    tuning = {"files": ("runs/model_tune.gin",), "LEARNING_RATE": 1e-4}
    one, eight, changed = folder / "tuned", folder / "tuned-1x8", folder / "tuned-2x4"
    many_trainings(tiny, {one: tuning}, 1, 1)
    many_trainings(tiny, {eight: tuning | MESHES["mixed"]}, 1, 8)
    shutil.copytree(eight, changed)
    for path in ("checkpoints/20", "best"):
        shutil.rmtree(changed / path)
    many_trainings(tiny, {changed: tuning | MESHES["fsdp"]}, 2, 4)
    expected = load_base(str(one / "best" / "model"), CONFIG).params
    for run in (eight, changed):
        found = load_base(str(run / "best" / "model"), CONFIG).params
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PromptTuning", *METHODS])
def test_a_data_parallel_step_exchanges_the_gradient_of_what_is_injected_and_the_metrics(tiny, name):
    """A residual prompt exchanges the prompt's gradient; each device computes the gradient of the network from it."""
    arguments = ["collectives", "[8, 1, 1]", name]
    (said,) = ends(start_group(tiny, [str(HERE / "on_mesh.py")], lambda flags: arguments, 1, 8))
    found = json.loads(said)
    injected, prompt_bytes = found["injected_bytes"], PROMPT_LENGTH * CONFIG.emb_dim * 4
    assert injected == prompt_bytes or name in ("PerLayerPrompt", "PrefixTuning", "LoRA", "IA3")
    assert set(found["sent"]) == {"all-reduce"}
    count, numbers, sent = found["sent"]["all-reduce"]
    assert injected <= sent < 4 * injected + 1024 and sent == 4 * numbers and count < 4


@pytest.mark.slow
@pytest.mark.parametrize("devices, mesh", [(8, {"fsdp": 8}), (8, {"model": 8}), (32, {"fsdp": 8, "model": 4})])
def test_of_xxl_each_device_holds_what_the_memory_plan_says(devices, mesh):
    found = scaling.start(["--size=xxl", f"--mesh={mesh}"], devices)
    assert found["planned_bytes"] == pytest.approx(found["frozen_bytes"], rel=0.01)
    whole = 2 * sum(int(np.prod(shape)) for shape in expected_shapes(SIZES["xxl"]).values())
    assert found["planned_bytes"] < 1.01 * whole / devices
    # The weights pass through the collectives of an fsdp axis twice, of a model axis never.
    gathered = found["sent"].get("all-gather", [0, 0, 0])[1] * 2 / (whole / mesh.get("model", 1))
    assert 1.5 < gathered < 2.5 if "fsdp" in mesh else gathered < 0.01

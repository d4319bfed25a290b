"""A run of prompt tuning is the same on any mesh and by any number of processes, and so is an evaluation."""

import json

import numpy as np
import pytest
from groups import MESHES, STEPS, ends, half_way, many_trainings, printed, start_group
from tiny import LENGTHS


def prompt(folder, step=STEPS):
    return np.load(folder / "prompts" / f"{step}.npy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def alone(tiny, folder):
    """The folder of the run on one device, whose checkpoint in the middle is that of a mesh once more."""
    many_trainings(tiny, {folder / "alone": {}}, 1, 1)
    return folder / "alone"


# By processes and devices of each. Four processes take the mesh of all three axes alone: each of them compiles all
# programs anew, and the other meshes differ for them as they do for two.
GROUPS = {"1x8": [*MESHES], "2x4": [*MESHES], "4x2": ["mixed"]}


def train_on_meshes(tiny, folder, processes, devices, before):
    """Trains on a group's meshes, and goes on with the run `before` from half-way; returns a run's folder for the next.

    The runs of a number of processes are one fixture, so that no test waits for those of all numbers.
    """
    name = f"{processes}x{devices}"
    runs = {folder / f"{name}-{mesh}": MESHES[mesh] for mesh in GROUPS[name]}
    runs |= {half_way(before, folder / f"{name}-changed"): MESHES["mixed"]}
    many_trainings(tiny, runs, processes, devices)
    return folder / f"{name}-{'fsdp' if 'fsdp' in GROUPS[name] else 'mixed'}"


@pytest.fixture(scope="module")
def by_1x8(tiny, folder, alone):
    return train_on_meshes(tiny, folder, 1, 8, alone)


@pytest.fixture(scope="module")
def by_2x4(tiny, folder, by_1x8):
    return train_on_meshes(tiny, folder, 2, 4, by_1x8)


@pytest.fixture(scope="module")
def by_4x2(tiny, folder, by_2x4):
    return train_on_meshes(tiny, folder, 4, 2, by_2x4)


@pytest.fixture(scope="module")
def by_1x1(tiny, folder, by_4x2):
    """The last of the runs that changed their mesh goes on where the first began: on one device."""
    many_trainings(tiny, {half_way(by_4x2, folder / "1x1-changed"): {}}, 1, 1)


RUNS = [f"{group}-{mesh}" for group, meshes in GROUPS.items() for mesh in (*meshes, "changed")] + ["1x1-changed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_prompt_is_the_same_on_any_mesh(request, folder, alone, name):
    """Dropout is on. A run that changed its mesh and processes in the middle is no other, either."""
    request.getfixturevalue(f"by_{name.partition('-')[0]}")
    start = prompt(alone, 0)
    np.testing.assert_array_equal(prompt(folder / name, 0), start)
    assert np.abs(prompt(alone) - start).max() > 0.1
    np.testing.assert_allclose(prompt(folder / name), prompt(alone), rtol=0, atol=1e-5)
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (folder / name, alone))
    for value in ("base_fingerprint", "examples_seen", "steps", "trainable_parameters"):
        assert ours[value] == theirs[value]
    assert len((folder / name / "metrics.jsonl").read_text().splitlines()) == len(
        (alone / "metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.slow
def test_a_prompt_on_an_int8_base_is_the_same_on_a_mesh(tiny, folder, alone):
    """A scale is of an output's whole column, which the mesh divides."""
    int8 = {"BASE_DTYPE": "int8"}
    many_trainings(tiny, {folder / "int8": int8}, 1, 1)
    many_trainings(tiny, {folder / "int8-1x8": int8 | MESHES["mixed"]}, 1, 8)
    np.testing.assert_allclose(prompt(folder / "int8-1x8"), prompt(folder / "int8"), rtol=0, atol=1e-5)
    assert np.abs(prompt(folder / "int8") - prompt(alone)).max() > 1e-4


@pytest.mark.slow
def test_eval_on_a_mesh_is_eval(tiny, tmp_path, alone):
    arguments = [
        *(f"--gin_file={file}" for file in (tiny.gin, "runs/eval.gin")),
        "--gin.MIXTURE_OR_TASK_NAME='demo_reviews'",
        f"--gin.TASK_FEATURE_LENGTHS={LENGTHS!r}",
        f"--gin.INITIAL_CHECKPOINT_PATH={str(tiny.base)!r}",
        "--gin.EVAL_SPLIT='validation[:64]'",
        "--gin.EVAL_BATCH_SIZE=30",  # which eight devices cannot share
        f"--gin.PROMPT_FILE={str(prompt_file(alone))!r}",
    ]
    program = ["-m", "prompt_tuning_jax.eval"]
    expected = ends(start_group(tiny, program, lambda flags: arguments + flags, 1, 1))
    for count, devices, macro in (
        (1, 8, "--gin.MESH={'fsdp': 2, 'model': 2}"),
        (2, 4, "--gin.EVAL_BATCH_SIZE=32"),
    ):
        said = ends(start_group(tiny, program, lambda flags, macro=macro: [*arguments, macro, *flags], count, devices))
        assert printed(said[0]) == printed(expected[0])


def prompt_file(run):
    return run / "prompts" / f"{STEPS}.npy"

"""Meshes and processes: how they are chosen and found; a process reads no byte twice and does not outlive its peers.

That training is the same on any mesh: test_meshes.py and test_meshes_of_methods.py, files of their own so that they run
beside each other.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import HERE, ends, printed, settings, start_group
from tiny import CONFIG, random_params

from experiments.sizes import SIZES
from prompt_tuning_jax.checkpoints import huggingface, t5x
from prompt_tuning_jax.checkpoints.base import expected_shapes, load_base
from prompt_tuning_jax.parallel import processes
from prompt_tuning_jax.parallel.mesh import AXES, MeshShape, mesh_shape
from prompt_tuning_jax.parallel.partitioner import logical_axes
from prompt_tuning_jax.parallel.processes import LOST_PEER, PeerWatch, process_of
from prompt_tuning_jax.t5.quantized import quantized
from prompt_tuning_jax.training.mesh_choice import mesh_for

KILLS = int(os.environ.get("KILL_TRIALS", "3"))


# --- the mesh


@pytest.mark.parametrize(
    "asked, num_partitions, devices, expected",
    [
        (None, None, 8, (8, 1, 1)),
        (None, 2, 8, (4, 1, 2)),
        ({"fsdp": 4}, None, 8, (2, 4, 1)),
        ({"fsdp": 2, "model": 2}, None, 8, (2, 2, 2)),
        ({"fsdp": 2}, 2, 8, (2, 2, 2)),
        ({"data": 8}, None, 8, (8, 1, 1)),
        ({"model": 2}, 2, 2, (1, 1, 2)),
    ],
)
def test_the_mesh_is_what_was_asked_for_and_data_has_the_rest(asked, num_partitions, devices, expected):
    assert mesh_shape(asked, num_partitions, devices) == expected


@pytest.mark.parametrize(
    "asked, num_partitions, message",
    [
        ({"tensor": 2}, None, "`mesh` has the key 'tensor', expected 'data' or 'fsdp' or 'model'"),
        ({"model": 3}, None, "`mesh` is for a multiple of 3 devices and there are 8: set `mesh` to sizes"),
        ({"data": 4}, None, "`mesh` is for 4 devices and there are 8"),
        (None, 3, "`num_partitions` is for a multiple of 3 devices and there are 8"),
        (None, 0, "`num_partitions` is 0, expected a whole number of at least 1"),
        ({"fsdp": 0}, None, r"`mesh`\['fsdp'\] is 0, expected a whole number of at least 1"),
        ({"model": 4}, 2, "`mesh` has a model axis of 4, `num_partitions` is 2"),
    ],
)
def test_another_mesh_is_refused(asked, num_partitions, message):
    with pytest.raises(ValueError, match=message) as error:
        mesh_shape(asked, num_partitions, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [CONFIG, SIZES["xxl"]])
def test_every_parameter_has_a_logical_axis_for_each_of_its_dimensions(config):
    axes = logical_axes(config)
    for path, shape in expected_shapes(config).items():
        assert len(axes[path]) == len(shape), path
    for path, array in random_params(0).items():
        for name, value in quantized(path, jnp.asarray(array)).items():
            assert len(logical_axes(CONFIG)[name]) == value.ndim, name


# --- how processes find each other


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ({}, {}, None),
        (
            {"coordinator_address": "a:1", "process_count": "2", "process_index": "1"},
            {},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
        ({"coordinator_address": "a:1", "process_count": "1", "process_index": "0"}, {}, None),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_PROCESS_COUNT": "4", "JOB_COMPLETION_INDEX": "3"},
            {"coordinator_address": "b:2", "num_processes": 4, "process_id": 3},
        ),
        ({}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, outside of srun
        ({}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-4]"}, {}),
        ({}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}, None),
    ],
)
def test_processes_are_found_by_flags_and_by_environment(flags, environment, expected):
    assert process_of(flags, environment) == expected


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        ({"process_count": "2"}, {}, "--process_count is set and --coordinator_address and --process_index not"),
        ({"coordinator_address": "a:1"}, {}, "--coordinator_address is set and --process_count and --process_index"),
        ({"coordinator_address": "a", "process_count": "2", "process_index": "0"}, {}, "expected HOST:PORT"),
        ({"coordinator_address": "a:1", "process_count": "2", "process_index": "2"}, {}, "is 2, expected 0 to 1"),
        ({"coordinator_address": "a:1", "process_count": "two", "process_index": "0"}, {}, "expected a number"),
        ({"coordinator_address": True, "process_count": "2", "process_index": "0"}, {}, "expected HOST:PORT"),
        (
            {},
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_PROCESS_COUNT": "4"},
            "JAX_COORDINATOR_ADDRESS is set and JOB_COM",
        ),
    ],
)
def test_half_an_address_is_refused(flags, environment, message):
    with pytest.raises(ValueError, match=message):
        process_of(flags, environment)


# --- what a process reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module", params=["huggingface", "t5x"])
def model(request, folder):
    """A synthetic base, in both formats."""
    params = jax.device_get(random_params(0))
    if request.param == "t5x":
        t5x.write(folder / "t5x" / "checkpoint_0", params)
        return folder / "t5x" / "checkpoint_0"
    huggingface.write(folder / "model", CONFIG, params)
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"fsdp": 8}, {"fsdp": 2, "model": 2}], ids=str)
def test_each_process_reads_its_own_bytes_once(tiny, model, axes):
    whole = load_base(str(model), CONFIG, None)
    total = sum(value.nbytes for value in whole.params.values())

    def arguments(flags):
        return ["load", str(model), json.dumps(axes), *flags]

    said = ends(start_group(tiny, [str(HERE / "on_mesh.py")], arguments, 2, 4))
    found = [printed(stdout) for stdout in said]
    for process in found:
        assert process["numbers_read_twice"] == 0
        assert process["read_bytes"] == process["own_bytes"]
        assert process["cast_where_it_is"]
        assert process["fingerprints"] == [whole.fingerprint] * 2
    if axes == {"fsdp": 8}:  # every matrix is divided: a half to each process, an eighth to each device
        assert max(process["read_bytes"] for process in found) < 0.55 * total
        assert max(process["device_bytes"] for process in found) < 0.2 * total
    else:
        assert all(process["read_bytes"] == total for process in found)


@pytest.mark.slow
def test_a_process_that_comes_late_to_a_program_is_waited_for(tiny):
    """Gloo would give up after 30 s if the groups of devices were not connected already."""
    said = ends(
        start_group(tiny, [str(HERE / "on_mesh.py")], lambda flags: ["late", '{"fsdp": 2}', "33", *flags], 2, 2)
    )
    assert [printed(stdout) for stdout in said] == [{"data": 2, "fsdp": 2, "model": 1}] * 2


# --- peers that are gone


@pytest.fixture(scope="module")
def undisturbed(tiny, folder):
    """The folder of a run by two processes, and the seconds from its first record to its last."""
    run = folder / "two"
    ends(start_two(tiny, run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run, lines[-1]["seconds"]


def start_two(tiny, folder):
    arguments = settings(tiny, folder, TRAIN_STEPS=100, EVAL_PERIOD=20, LOG_PERIOD=10, LEARNING_RATE=0.3)
    return start_group(tiny, ["-m", "prompt_tuning_jax.train"], lambda flags: arguments + flags, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(KILLS))
def test_the_other_of_two_processes_ends_and_both_go_on(tiny, undisturbed, tmp_path, trial):
    """The one is killed at any time; then every prompt, to the last bit, is the undisturbed run's."""
    whole, seconds = undisturbed
    rng = random.Random(trial)
    group = start_two(tiny, tmp_path / "run")
    while not (tmp_path / "run" / "config.gin").exists():
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 1.2 * seconds))
    victim = trial % 2
    group[victim].kill()
    started = time.monotonic()
    _, said = group[1 - victim].communicate(timeout=60)
    assert time.monotonic() - started < 30
    if group[1 - victim].returncode != 0:  # 0: it had finished already
        # JAX's own service, or our line, whichever is first to notice.
        assert group[1 - victim].returncode in (LOST_PEER, -6)
        assert "lost another" in said or "another task died" in said
    group[victim].communicate()
    ends(start_two(tiny, tmp_path / "run"))
    names = sorted(path.name for path in (whole / "prompts").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "run" / "prompts").iterdir())
    for name in names:
        assert (tmp_path / "run" / "prompts" / name).read_bytes() == (whole / "prompts" / name).read_bytes()


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_the_same_step_of_both(tiny, undisturbed, tmp_path):
    whole, _ = undisturbed
    group = start_two(tiny, tmp_path / "run")
    while not (tmp_path / "run" / "prompts" / "20.npy").exists():
        time.sleep(0.02)
    group[1].terminate()
    said = [process.communicate(timeout=60)[1] for process in group]
    assert [process.returncode for process in group] == [143, 143], said
    assert "terminated, saved at step" in said[0] and "terminated" not in said[1].replace("Terminated", "")
    ends(start_two(tiny, tmp_path / "run"))
    one, other = (np.load(run / "prompts" / "100.npy") for run in (tmp_path / "run", whole))
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_peer_that_stands_still_ends_the_other(tiny, tmp_path):
    """By missing heartbeats, which are waited for 5 seconds here."""
    program = "from prompt_tuning_jax.parallel import processes; processes.HEARTBEAT_SECONDS = 5; "
    program += "from prompt_tuning_jax.train import main; main()"
    arguments = settings(tiny, tmp_path / "run", TRAIN_STEPS=10_000, EVAL_PERIOD=20)
    group = start_group(tiny, ["-c", program], lambda flags: arguments + flags, 2, 1)
    while not (tmp_path / "run" / "prompts" / "20.npy").exists():
        time.sleep(0.02)
    group[1].send_signal(signal.SIGSTOP)
    try:
        _, said = group[0].communicate(timeout=60)
    finally:
        group[1].kill()
        group[1].communicate()
    assert group[0].returncode in (LOST_PEER, -6)
    assert "lost another" in said or "another task died" in said


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_it_and_the_other(tiny, tmp_path):
    def arguments(flags):
        base = {"INITIAL_CHECKPOINT_PATH": "/no/where"} if "--process_index=1" in flags else {}
        return settings(tiny, tmp_path / "run", **base) + flags

    group = start_group(tiny, ["-m", "prompt_tuning_jax.train"], arguments, 2, 1)
    said = [process.communicate(timeout=90)[1] for process in group]
    assert group[1].returncode == 2 and re.search("(?m)^error: no base model at /no/where", said[1])
    assert group[0].returncode in (LOST_PEER, -6)
    assert "lost another" in said[0] or "another task died" in said[0]


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_said_by_each(tiny, tmp_path):
    arguments = settings(tiny, tmp_path / "run", INITIAL_CHECKPOINT_PATH="/no/where")
    group = start_group(tiny, ["-m", "prompt_tuning_jax.train"], lambda flags: arguments + flags, 2, 1)
    said = [process.communicate(timeout=90)[1] for process in group]
    assert [process.returncode for process in group] == [2, 2]
    assert all(re.search("(?m)^error: no base model at /no/where", text) for text in said)
    assert not (tmp_path / "run").exists()


def test_a_peer_that_lives_and_does_nothing_is_told_by_time(monkeypatch):
    left = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(processes, "exit_without_barrier", lambda code, line: left.append((code, line)))
    with PeerWatch() as watch:
        watch.saved_step = 40
        for _ in range(10):
            time.sleep(0.06)
            watch.note_work()
        assert not left
        time.sleep(0.6)
    assert left[0][0] == LOST_PEER
    assert re.fullmatch(
        r"error: no batch .* in \d+ s: another process is stuck; start all processes again, they go on from step 40",
        left[0][1],
    )


@pytest.mark.parametrize(
    "error, leaves",
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("BATCH_SIZE is 3"), False),
    ],
)
def test_only_an_error_of_a_peer_is_taken_for_one(monkeypatch, error, leaves):
    left = []
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "exit_without_barrier", lambda code, line: left.append(code))
    with pytest.raises(type(error)), PeerWatch():
        raise error
    assert left == ([LOST_PEER] if leaves else [])
    with pytest.raises(type(error)):
        monkeypatch.setattr(processes.jax, "process_count", lambda: 1)
        with PeerWatch():
            raise error
    assert left == ([LOST_PEER] if leaves else [])


# --- the commands


@pytest.mark.slow
def test_slurm_starts_the_processes(tiny, tmp_path):
    """Two tasks of a job step, by Slurm's own variables."""
    arguments = settings(tiny, tmp_path / "run")
    with socket.socket() as free:  # JAX takes the port from the job's number
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1]
    group = []
    for task in range(2):
        names = {"JOB_ID": job, "NTASKS": 2, "PROCID": task, "LOCALID": task, "STEP_NODELIST": "127.0.0.1"}
        slurm = {f"SLURM_{name}": str(value) for name, value in names.items()} | {"SLURM_STEP_NUM_NODES": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tiny.folder}
        command = [sys.executable, "-m", "prompt_tuning_jax.train", *arguments]
        group.append(subprocess.Popen(command, env=os.environ | tiny.environment | slurm, **pipes))
    said = ends(group)
    assert "best at step" in said[0] and "best at step" not in said[1]
    assert (
        len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    )  # of one writer: two of train, two of eval


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"MESH": {"fsdp": 3}}, "error: MESH is for a multiple of 3 devices and there are 4"),
        ({"BATCH_SIZE": 6}, "error: BATCH_SIZE is 6, which the 4 parts that the mesh divides it into cannot share"),
        ({"NUM_MICROBATCHES": 8}, "error: NUM_MICROBATCHES is 8, 2 rows each, which the 4 parts that the mesh"),
    ],
)
def test_a_mesh_that_does_not_fit_leaves_nothing(tiny, tmp_path, macros, message):
    macros = {"MESH": {"data": 4}} | macros
    arguments = settings(tiny, tmp_path / "run", **macros)
    (process,) = start_group(tiny, ["-m", "prompt_tuning_jax.train"], lambda flags: arguments + flags, 1, 4)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and said.splitlines()[-1].startswith(message), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "devices, batch, memory, parameters, activations, expected",
    [
        (8, 32, None, 10**12, 10**12, (8, 1, 1)),  # nothing is known of the devices
        (8, 32, 100, 80, 40, (8, 1, 1)),  # all fits
        (8, 32, 100, 100, 40, (4, 2, 1)),  # halves do
        (8, 32, 100, 300, 40, (2, 4, 1)),
        (8, 32, 100, 10**4, 40, (1, 8, 1)),  # nothing does: the most that can be done
        (16, 4, 100, 80, 40, (4, 1, 4)),  # rows for four devices only
        (6, 32, 100, 80, 40, (2, 1, 3)),
    ],
)
def test_a_mesh_is_chosen_by_size_and_memory(devices, batch, memory, parameters, activations, expected):
    assert mesh_for(devices, batch, memory, parameters, activations) == expected


def test_axes_are_named_as_documented():
    assert MeshShape._fields == AXES

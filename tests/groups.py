"""Starts runs of the tiny base model in one process or a group of processes, with any number of devices each."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STEPS, EVAL_PERIOD = 20, 10
MESHES = {
    "data": {},
    "tensor": {"NUM_PARTITIONS": 2},
    "fsdp": {"MESH": {"fsdp": 8}},
    "mixed": {"MESH": {"fsdp": 2, "model": 2}},
}
# With the paper's rate of 0.3, training a prompt on random weights is unstable: a difference in the last digit triples
# in every step. With this rate the prompt moves by a sixth of its size in 20 steps.
RATE = 0.01


def start_group(tiny, program, arguments, processes, devices, **options):
    """Starts the processes of a distributed program, with `devices` CPU devices each, and returns them."""
    environment = os.environ | tiny.environment | {"PYTHONPATH": f"{tiny.environment['PYTHONPATH']}:{HERE}"}
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tiny.folder} | options
    flags = [f"--coordinator_address={address}", f"--process_count={processes}"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments([*flags, f"--process_index={i}"] if processes > 1 else [])],
            env=environment,
            **pipes,
        )
        for i in range(processes)
    ]


def ends(group):
    """Waits for all processes of a group, checks that each succeeded, and returns the standard output of each."""
    try:
        said = [process.communicate(timeout=300) for process in group]
    finally:
        for process in group:
            process.kill()  # a process may still be waiting for one that failed
            process.communicate()
    assert [process.returncode for process in group] == [0] * len(group), said[0][1][-3000:]
    return [stdout for stdout, _ in said]


def printed(stdout):
    """Returns the JSON object that a process printed. Gloo prints as well, before it or after it, without braces."""
    return json.loads(stdout[stdout.index("{") : stdout.rindex("}") + 1])


def many_trainings(tiny, folders, processes, devices):
    """Trains once per folder, one after another, with the same group of processes."""
    runs = [settings(tiny, folder, **macros) for folder, macros in folders.items()]
    arguments = lambda flags: [json.dumps([run + flags for run in runs])]  # noqa: E731
    ends(start_group(tiny, [str(HERE / "many_trainings.py")], arguments, processes, devices))


def settings(tiny, folder, **macros):
    steps = {"TRAIN_STEPS": STEPS, "EVAL_PERIOD": EVAL_PERIOD, "BATCH_SIZE": 16}
    chosen = {"DROPOUT_RATE": 0.1, "LEARNING_RATE": RATE, "MODEL_DIR": str(folder)} | macros
    files = chosen.pop("files", ())
    return tiny.arguments(*files, **(steps | chosen))


def half_way(source, target):
    """Copies a run to `target` without what it wrote in its second half, and returns `target`."""
    shutil.copytree(source, target)
    for path in ("checkpoints/20", "best", "summary.json", "prompts/20.npy"):
        path = target / path
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=path.parent.name == "prompts")
    return target

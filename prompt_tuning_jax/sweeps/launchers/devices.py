"""Divides this machine's GPUs, TPU chips or cores among several processes, without importing JAX."""

import contextlib
import glob
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Slot(NamedTuple):
    """Holds the part of the machine that a job may use.

    Attributes:
      environment: environment variables that limit the job to its devices.
      cores: the CPU cores, such as "0,1"; "" means all cores.
    """

    environment: Mapping[str, str]
    cores: str


def divide_machine(processes: int | None, jobs: int) -> list[Slot]:
    """Returns one slot per job that runs at the same time.

    JAX would claim the devices for this process, so they are found without it.

    Raises:
      ValueError: `processes` is not positive, or is more than the number of TPU chips.
    """
    if processes is not None and processes < 1:
        raise ValueError(
            f"the local launcher's processes is {processes}, expected at least 1, or None for one a device"
        )
    gpus, chips = visible_gpus(), visible_tpu_chips()
    count = max(min(processes or len(gpus) or len(chips) or 1, jobs), 1)
    if gpus:
        return [Slot(_gpu_environment(gpus, index, count), "") for index in range(count)]
    if chips and count > len(chips):
        raise ValueError(
            f"the local launcher's processes is {processes}, but this host has {len(chips)} TPU chips, "
            "which two processes cannot share: expected that many at most"
        )
    if chips:
        return [Slot(_tpu_environment(chips[index]) if count > 1 else {}, "") for index in range(count)]
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" and count > 1 else []
    return [Slot({}, ",".join(map(str, _part_of(cores, index, count)))) for index in range(count)]


def visible_gpus() -> list[str]:
    """Returns the NVIDIA GPUs that JAX would see, named as in CUDA_VISIBLE_DEVICES."""
    if _on_cpu():
        return []
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(itertools.takewhile(lambda device: device not in ("", "-1"), given.split(",")))
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return [line for line in found.stdout.split() if line.isdecimal()] if found.returncode == 0 else []
    return []


def visible_tpu_chips() -> list[str]:
    """Returns the indices of this host's TPU chips; an empty list if libtpu is not installed."""
    if _on_cpu() or importlib.util.find_spec("libtpu") is None:
        return []
    if given := os.environ.get("TPU_VISIBLE_CHIPS"):
        return given.split(",")
    devices = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return [str(chip) for chip in range(len(devices))]


def _on_cpu() -> bool:
    return os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu"


def _gpu_environment(gpus: Sequence[str], index: int, count: int) -> dict[str, str]:
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(_part_of(gpus, index, count))}
    if count > len(gpus) and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        sharing = -(-count // len(gpus))  # by default JAX preallocates 75% of the memory per process
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
    return environment


def _tpu_environment(chip: str) -> dict[str, str]:
    """Returns variables that limit a process to one TPU chip, as in jax/_src/test_multiprocess.py."""
    port = 8476 + int(chip)
    return {
        "TPU_VISIBLE_CHIPS": chip,
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": str(port),
        "CLOUD_TPU_TASK_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _part_of(items: Sequence[Any], index: int, count: int) -> Sequence[Any]:
    """Returns part `index` of the items, which are divided into `count` contiguous and nearly equal parts.

    If there are fewer items than parts, each part has one item, and several parts share it.
    """
    if 0 < len(items) < count:
        return [items[index % len(items)]]
    return items[len(items) * index // count : len(items) * (index + 1) // count]

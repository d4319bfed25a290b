"""Runs many processes as one program: connects them, names the one that writes, and ends those that lost another.

Processes are found by flags, by JAX_COORDINATOR_ADDRESS and its related variables (docs/gpu.md), by Slurm's variables
of a job step, or by the TPU machine that they run on. Otherwise there is one process.
"""

import contextlib
import importlib.util
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the only barrier with a time limit, for processes that may not come
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FLAGS = ("coordinator_address", "process_count", "process_index")
START_SECONDS = 300  # how long a process waits for the others to start
HEARTBEAT_SECONDS = 60  # a process without a heartbeat for so long counts as dead, and JAX ends the others
LAST_SECONDS = 20  # how long a process that ends with an error waits for the others to do the same
STUCK_SECONDS = 1_800  # a run without a batch for so long counts as stuck: longer than any compilation or pause
OF_PEERS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
LOST_PEER = 75  # exit code (EX_TEMPFAIL): another process is gone; start all of them again


def start_processes(flags: Mapping[str, str | bool], environment: Mapping[str, str] = os.environ) -> None:
    """Connects to the other processes, if there are any. Must be called before anything asks JAX for a device.

    Args:
      flags: the flags of the command line; only those in `FLAGS` are read, which have T5X's names.

    Raises:
      ValueError: the flags or variables are incomplete, or the other processes did not come.
    """
    found = process_of(flags, environment)
    if found is None:
        return
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        where = found.get("coordinator_address", "the address that the machine gives")
        raise ValueError(
            f"the processes did not meet at {where} ({reason}): start all of them, with one coordinator address that "
            "each can reach"
        ) from None


def process_of(flags: Mapping[str, str | bool], environment: Mapping[str, str]) -> dict | None:
    """Returns the arguments of `jax.distributed.initialize`, {} if JAX finds them itself; None for a single process.

    Raises:
      ValueError: the flags or variables are incomplete.
    """
    given = {name: flags[name] for name in FLAGS if name in flags}
    variables = {
        "coordinator_address": "JAX_COORDINATOR_ADDRESS",
        "process_count": "JAX_PROCESS_COUNT",
        "process_index": "JAX_PROCESS_INDEX" if "JAX_PROCESS_INDEX" in environment else "JOB_COMPLETION_INDEX",
    }
    names = {name: f"--{name}" for name in FLAGS}
    if not given and variables["coordinator_address"] in environment:
        given = {name: environment[variable] for name, variable in variables.items() if variable in environment}
        names = variables
    if given:
        missing = [names[name] for name in FLAGS if name not in given]
        if missing:
            there = next(names[name] for name in given)
            raise ValueError(f"{there} is set and {' and '.join(missing)} not: set all three, or none of them")
        count, index = (_number(names[name], given[name]) for name in FLAGS[1:])
        address = given["coordinator_address"]
        if not isinstance(address, str) or not address.rpartition(":")[2].isdigit() or address.startswith(":"):
            raise ValueError(f"{names['coordinator_address']} is {address}, expected HOST:PORT of process 0")
        if not 0 <= index < count:
            raise ValueError(f"{names['process_index']} is {index}, expected 0 to {count - 1}, one less than the count")
        return {"coordinator_address": address, "num_processes": count, "process_id": index} if count > 1 else None
    # Slurm sets SLURM_NTASKS in a batch script, too; it sets SLURM_STEP_NODELIST only in what `srun` started.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {}
    if "TPU_VISIBLE_CHIPS" in environment:  # the host's other chips belong to another, independent process
        return None
    on_tpu = importlib.util.find_spec("libtpu") is not None and any(map(_any_file, ("/dev/accel*", "/dev/vfio/[0-9]*")))
    return {} if on_tpu and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") else None


def _number(name: str, text: str | bool) -> int:
    if not (isinstance(text, str) and text.isdigit()):
        raise ValueError(f"{name} is {text}, expected a number")
    return int(text)


def _any_file(pattern: str) -> bool:
    return any(Path("/").glob(pattern.lstrip("/")))


def is_writer() -> bool:
    """Returns whether this is process 0, which writes the files that are written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have called this function."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


_connections = itertools.count()


def connect(mesh: Mesh) -> None:
    """Connects every group of devices whose programs on this mesh may exchange arrays. All processes call it together.

    On CPUs, Gloo connects the processes. It connects a group of devices when the group's first program runs, and fails
    if one process starts that program more than 30 s after another, for instance because it is still compiling. Once a
    group is connected, its programs wait without a limit. So this function waits until all processes have called it,
    and then runs a small program on every group. On other devices it does nothing.

    Raises:
      JaxRuntimeError: a process did not come within `START_SECONDS`.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for count in range(1, len(axes) + 1) for group in itertools.combinations(axes, count)]
    sums = jax.shard_map(
        lambda x: [jax.lax.psum(x, group) for group in groups],
        mesh=mesh,
        in_specs=PartitionSpec(mesh.axis_names),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.ones(mesh.size, np.float32)[index])
    program = jax.jit(sums).lower(ones).compile()
    client: Any = distributed.global_state.client
    client.wait_at_barrier(f"connecting {next(_connections)}", START_SECONDS * 1_000)
    jax.block_until_ready(program(ones))
    barrier("connected")  # connects the group that `barrier` itself uses: one device of each process


def preempted(step: int) -> bool:
    """Returns whether the processes agreed to end after this step, because one got SIGTERM or a maintenance notice.

    All processes must call this at every step. They agree on a step that none of them has passed.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def exit_without_barrier(code: int, line: str = "") -> None:
    """Ends this process at once, without JAX's barrier at shutdown, to which the other processes would not come."""
    print(line, end="\n" if line else "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def exiting_alone() -> Iterator[None]:
    """Lets one of several processes end with exit code 2 while the others run on; they then find it gone.

    Most often all processes have the same error, and each should print it. So this one first waits for the others to
    end, too. JAX's coordination service runs in process 0, and a process that loses it is ended: process 0 leaves last.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code == 2 and jax.process_count() > 1:
            with contextlib.suppress(Exception):  # the barrier fails if the others do not come or are gone
                client: Any = distributed.global_state.client
                client.wait_at_barrier("leaving", LAST_SECONDS * 1_000)
                time.sleep(1 if is_writer() else 0)
            exit_without_barrier(2)
        raise


class PeerWatch:
    """A context that ends this process, with a line that says why, if another process is gone or stuck.

    A dead process shows as an error of the program that waits for it. If its machine is gone as well, heartbeats are
    missing, and JAX itself ends this process. A process that lives but does nothing is found by the time since the last
    batch. With one process, nothing is watched.

    Attributes:
      saved_step: the step that a restart resumes from; None if nothing is saved.
      last_work: when this process last had work, by `time.monotonic`.
    """

    def __init__(self):
        self.saved_step: int | None = None
        self.last_work = time.monotonic()
        self._ended, self._watches = threading.Event(), jax.process_count() > 1

    def __enter__(self) -> "PeerWatch":
        if self._watches:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def note_work(self) -> None:
        """Notes that this process has work, such as a batch."""
        self.last_work = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(STUCK_SECONDS / 60):
            idle = time.monotonic() - self.last_work
            if idle > STUCK_SECONDS:
                self._exit(f"no batch was finished in {idle:.0f} s: another process is stuck")

    def _exit(self, reason: str) -> None:
        from_step = "" if self.saved_step is None else f", they go on from step {self.saved_step}"
        exit_without_barrier(LOST_PEER, f"error: {reason}; start all processes again{from_step}")

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        self._ended.set()
        # Some of JAX's errors arrive as ValueErrors.
        if self._watches and isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and OF_PEERS.match(str(error)):
            reason = str(error).strip().splitlines()[0][:200]
            self._exit(f"process {jax.process_index()} of {jax.process_count()} lost another ({reason})")

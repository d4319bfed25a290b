"""Many processes as one program: how they find each other, who writes, and how one leaves that the others have left.

A process is found by flags, by JAX_COORDINATOR_ADDRESS and its neighbours (docs/gpu.md), by Slurm's variables of a
job step, or by the TPU machine that it runs on; else there is one.
"""

import contextlib
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # the one way to wait for processes that may not come
from jax.experimental import multihost_utils

FLAGS = ("coordinator_address", "process_count", "process_index")
START_SECONDS = 300  # to wait for all processes
HEARTBEAT_SECONDS = 60  # without a sign of life a process is taken for dead, and JAX ends the others
LAST_SECONDS = 20  # that a process which ends with an error waits for the others to do the same
STUCK_SECONDS = 1_800  # without a batch a run is taken for stuck: more than any compilation or pause between two takes
OF_PEERS = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")
LOST_PEER = 75  # exit code: another process is gone, start all of them again (EX_TEMPFAIL)


def start_processes(flags: Mapping[str, str | bool], environment: Mapping[str, str] = os.environ) -> None:
    """Meets the other processes, where there are any. Before anything that asks JAX for a device.

    Args:
      flags: of the command line; those of `FLAGS` are read, T5X's of the same names.

    Raises:
      ValueError: the flags or variables are not complete, or the others did not come.
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
    """The arguments of `jax.distributed.initialize`: none where JAX finds them itself; None for one process alone.

    Raises:
      ValueError: the flags or variables are not complete.
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
    # Slurm sets SLURM_NTASKS in a batch script too; the nodes of a step are known only to what `srun` started.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {}
    if "TPU_VISIBLE_CHIPS" in environment:  # chips of a host that another process has the rest of
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
    """Whether this is the process that writes what is written once: process 0."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes to come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def preempted(step: int) -> bool:
    """Whether the processes agreed to end after this step: SIGTERM, or a notice of maintenance, came to one of them.

    All processes ask, at every step. The first that is told names a step that none of them has passed.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def leave(code: int, line: str = "") -> None:
    """Ends this process at once, without the meeting at the end, which the others would not come to."""
    print(line, end="\n" if line else "", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving_alone() -> Iterator[None]:
    """Lets one of several processes end with exit code 2 while the others go on, who then lose it.

    Most often what is wrong is wrong for all, and each is to say so itself: it waits for the others to come here, too.
    JAX's service, which process 0 has, ends a process whose peers are gone; so process 0 leaves last.
    """
    try:
        yield
    except SystemExit as ended:
        if ended.code == 2 and jax.process_count() > 1:
            with contextlib.suppress(Exception):  # of the barrier: the others do not come, or are gone
                client: Any = distributed.global_state.client
                client.wait_at_barrier("leaving", LAST_SECONDS * 1_000)
                time.sleep(1 if is_writer() else 0)
            leave(2)
        raise


class PeerWatch:
    """While in this context, a peer that is gone or stuck ends this process with a line that says so.

    The death of a peer shows as an error of the program that waits for it, or, where its machine says nothing, as
    missing heartbeats, upon which JAX itself ends this process. A peer that lives and does nothing is told by time.
    With one process there is nothing to watch.

    Attributes:
      saved_step: that another start goes on from; None where nothing is saved.
      last_work: when there was something to do, by `time.monotonic`.
    """

    def __init__(self):
        self.saved_step: int | None = None
        self.last_work = time.monotonic()
        self._over, self._watches = threading.Event(), jax.process_count() > 1

    def __enter__(self) -> "PeerWatch":
        if self._watches:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def work(self) -> None:
        """Notes that this process has something to do: a batch, say."""
        self.last_work = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(STUCK_SECONDS / 60):
            idle = time.monotonic() - self.last_work
            if idle > STUCK_SECONDS:
                self._leave(f"no batch was finished in {idle:.0f} s: another process is stuck")

    def _leave(self, reason: str) -> None:
        from_step = "" if self.saved_step is None else f", they go on from step {self.saved_step}"
        leave(LOST_PEER, f"error: {reason}; start all processes again{from_step}")

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        self._over.set()
        # Of JAX's errors some arrive as ValueErrors.
        if self._watches and isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and OF_PEERS.match(str(error)):
            reason = str(error).strip().splitlines()[0][:200]
            self._leave(f"process {jax.process_index()} of {jax.process_count()} lost another ({reason})")

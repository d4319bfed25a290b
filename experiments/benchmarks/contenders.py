"""Runs the contenders of a benchmark, each in its own process, which do the same work in turns. Linux only."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EOS = 1
TOKENS = 8_000  # random token ids are below this, because every size's embedding table has them
ANSWER = "answer "  # the prefix of a contender's answers; its other output lines are ignored
TICKS = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))


def write_base(folder: Path, size: str) -> None:
    """Writes a random base model in Hugging Face's layout, which never predicts the end of sequence: its logit is 0."""
    from experiments.sizes import SIZES
    from prompt_tuning_jax.checkpoints import huggingface
    from prompt_tuning_jax.checkpoints.base import expected_shapes

    rng, params = np.random.default_rng(0), {}
    for path, shape in expected_shapes(SIZES[size]).items():
        params[path] = rng.standard_normal(shape, np.float32) * np.float32(deviation(path, shape, SIZES[size].head_dim))
        if path.endswith("scale"):
            params[path] = np.ones(shape, np.float32)
    params["decoder/logits_dense/kernel"][:, EOS] = 0.0
    huggingface.write(folder, SIZES[size], params)


def deviation(path: str, shape: Sequence[int], head_dim: int) -> float:
    """Returns a standard deviation for a random parameter with which activations neither vanish nor grow."""
    if not path.endswith("kernel"):
        return 1.0
    return shape[0] ** -0.5 * (head_dim**-0.5 if "query" in path else 1.0)


def random_prompt(seed: int, length: int, size: str) -> np.ndarray:
    from experiments.sizes import SIZES

    return np.random.default_rng(seed).standard_normal((length, SIZES[size].emb_dim), np.float32)


def random_inputs(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2, TOKENS, (batch, length)).astype(np.int32)


class Contender:
    """A process that answers questions, and is idle in between."""

    def __init__(self, module: str, arguments: Sequence[str], threads: int = CORES, device: str = "cpu"):
        """Starts `python -m MODULE ARGUMENTS` on `threads` cores. The module must call `work` or `answer`.

        Args:
          module, arguments: the module, and its command line's arguments.
          threads: the number of cores.
          device: "cpu", or "default" for the accelerator if there is one.
        """
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))}
        if device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self._process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", module, *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line: str) -> Any:
        """Sends a line to the process, and returns its answer."""
        assert self._process.stdin and self._process.stdout
        print(line, file=self._process.stdin, flush=True)
        for output in self._process.stdout:
            if output.startswith(ANSWER):
                return json.loads(output.removeprefix(ANSWER))
        raise RuntimeError(f"the process ended with {self._process.wait()}: its error is above")

    def used(self) -> float:
        """Returns the CPU seconds that the process has used so far."""
        return sum(map(int, _stat(self._process.pid)[11:13])) / TICKS

    def seconds(self, line: str) -> float:
        """Lets the process do the work that it knows by this line, and returns the seconds that it took."""
        return float(self.ask(line))

    def end(self) -> None:
        self._process.communicate()


def answer(respond: Callable[[str], Any]) -> None:
    """Answers each line on stdin with the result of `respond`. Runs in a contender's process."""
    for line in map(str.strip, sys.stdin):
        print(ANSWER + json.dumps(respond(line)), flush=True)


def work(prepare: Callable[[str], Callable[[], object]]) -> None:
    """Does the work that each line on stdin asks for, and answers with the seconds. Runs in a contender's process.

    Args:
      prepare: returns the function to time for a line. It is called once per different line, and the function is called
        once before it is timed.
    """
    known: dict[str, Callable[[], object]] = {}

    def respond(line: str) -> float:
        if line not in known:
            known[line] = prepare(line)
            known[line]()  # compiled and warm
        return timed(known[line])

    answer(respond)


def age() -> float:
    """Returns the seconds since this process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(os.getpid())[19]) / TICKS


def _stat(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat from the process's state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def used_elsewhere(contenders: Iterable[Contender]) -> float:
    """Returns the CPU seconds that all processes except the contenders have used so far.

    The difference of two calls shows whether the contenders had their cores to themselves.
    """
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / TICKS - sum(contender.used() for contender in contenders)


def peak_bytes() -> int:
    """Returns the peak of this process's memory on the host, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def timed(what: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def medians(contenders: Mapping[str, Contender], work: Sequence[tuple[str, str]], rounds: int) -> list[float]:
    """Returns the median seconds of each (contender, line), measured in turns. The first round is not used."""
    times = [[contenders[name].seconds(line) for name, line in work] for _ in range(rounds + 1)]
    found = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    for (name, line), seconds in zip(work, found, strict=True):
        print(json.dumps({"contender": name, "asked": line, "seconds": seconds}), flush=True)
    return found

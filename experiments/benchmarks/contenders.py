"""Contenders of a benchmark: a process each, which do the same work by turns. Linux only."""

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
TOKENS = 8_000  # ids that the table of every size has
ANSWER = "answer "  # before what a contender answers; its other lines are not for the other side
TICKS = os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))


def write_base(folder: Path, size: str) -> None:
    """A random base in Hugging Face's layout, whose end of sequence has a logit of 0: it is never the likeliest."""
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
    """The standard deviation of a random parameter, with which activations neither vanish nor grow."""
    if not path.endswith("kernel"):
        return 1.0
    return shape[0] ** -0.5 * (head_dim**-0.5 if "query" in path else 1.0)


def random_prompt(seed: int, length: int, size: str) -> np.ndarray:
    from experiments.sizes import SIZES

    return np.random.default_rng(seed).standard_normal((length, SIZES[size].emb_dim), np.float32)


def random_inputs(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2, TOKENS, (batch, length)).astype(np.int32)


class Contender:
    """A process that answers what it is asked, and idles in between."""

    def __init__(self, module: str, arguments: Sequence[str], threads: int = CORES, device: str = "cpu"):
        """Starts `python -m MODULE ARGUMENTS` on `threads` cores; it calls `work` or `answer`.

        Args:
          device: "cpu", or "default" for the accelerator where there is one.
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
        """What it answers."""
        assert self._process.stdin and self._process.stdout
        print(line, file=self._process.stdin, flush=True)
        for said in self._process.stdout:
            if said.startswith(ANSWER):
                return json.loads(said.removeprefix(ANSWER))
        raise RuntimeError(f"the process ended with {self._process.wait()}: its error is above")

    def used(self) -> float:
        """Seconds of processor time so far."""
        return sum(map(int, _stat(self._process.pid)[11:13])) / TICKS

    def seconds(self, asked: str) -> float:
        """How long it took to do what it knows by this line."""
        return float(self.ask(asked))

    def end(self) -> None:
        self._process.communicate()


def answer(respond: Callable[[str], Any]) -> None:
    """In a contender's process: answers each line on stdin with what `respond` gives for it."""
    for line in map(str.strip, sys.stdin):
        print(ANSWER + json.dumps(respond(line)), flush=True)


def work(prepare: Callable[[str], Callable[[], object]]) -> None:
    """In a contender's process: does what each line on stdin asks for, and answers with the seconds that took.

    Args:
      prepare: from a line to what is timed; called once a line, and what it gives once before the first timing.
    """
    known: dict[str, Callable[[], object]] = {}

    def respond(line: str) -> float:
        if line not in known:
            known[line] = prepare(line)
            known[line]()  # compiled and warm
        return timed(known[line])

    answer(respond)


def age() -> float:
    """Seconds since this process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(os.getpid())[19]) / TICKS


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def used_elsewhere(contenders: Iterable[Contender]) -> float:
    """Seconds of processor time that everything else on this machine has used so far: over two of them it shows whether
    the contenders had their cores to themselves."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / TICKS - sum(contender.used() for contender in contenders)


def peak_bytes() -> int:
    """The most memory that this process has held on the host."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def timed(what: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def medians(contenders: Mapping[str, Contender], asked: Sequence[tuple[str, str]], rounds: int) -> list[float]:
    """Of every (contender, line), taken by turns; the first round is not used."""
    times = [[contenders[name].seconds(line) for name, line in asked] for _ in range(rounds + 1)]
    found = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    for (name, line), seconds in zip(asked, found, strict=True):
        print(json.dumps({"contender": name, "asked": line, "seconds": seconds}), flush=True)
    return found

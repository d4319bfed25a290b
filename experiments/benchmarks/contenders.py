"""Contenders of a benchmark: a process each, which do the same work by turns. Linux only."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

EOS = 1
CORES = len(os.sched_getaffinity(0))


def write_base(folder: Path, size: str) -> None:
    """A random base in Hugging Face's layout, whose end of sequence has a logit of 0: it is never the likeliest."""
    from prompt_tuning_jax.checkpoints import huggingface
    from prompt_tuning_jax.checkpoints.base import expected_shapes
    from prompt_tuning_jax.t5.config import SIZES

    rng, params = np.random.default_rng(0), {}
    for path, shape in expected_shapes(SIZES[size]).items():
        scale = shape[0] ** -0.5 * (SIZES[size].head_dim ** -0.5 if "query" in path else 1.0)
        params[path] = rng.standard_normal(shape, np.float32) * np.float32(scale if path.endswith("kernel") else 1.0)
        if path.endswith("scale"):
            params[path] = np.ones(shape, np.float32)
    params["decoder/logits_dense/kernel"][:, EOS] = 0.0
    huggingface.write(folder, SIZES[size], params)


def random_prompt(seed: int, length: int, size: str) -> np.ndarray:
    from prompt_tuning_jax.t5.config import SIZES

    return np.random.default_rng(seed).standard_normal((length, SIZES[size].emb_dim), np.float32)


def random_inputs(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2, 32_000, (batch, length)).astype(np.int32)


class Contender:
    """A process that does what it is asked, and says how long it took."""

    def __init__(self, module: str, arguments: Sequence[str], threads: int = CORES):
        """Starts `python -m MODULE ARGUMENTS` on `threads` cores; it calls `work`."""
        cores = sorted(os.sched_getaffinity(0))[:threads]
        environment = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))}
        self._process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), sys.executable, "-m", module, *arguments],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, asked: str) -> float:
        """Has it do what it knows by this line."""
        assert self._process.stdin and self._process.stdout
        print(asked, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the process ended with {self._process.wait()}: its error is above")

    def end(self) -> None:
        self._process.communicate()


def work(prepare: Callable[[str], Callable[[], object]]) -> None:
    """In a contender's process: does what each line on stdin asks for.

    Args:
      prepare: from a line to what is timed; called once a line, and what it gives once before the first timing.
    """
    known: dict[str, Callable[[], object]] = {}
    for line in map(str.strip, sys.stdin):
        if line not in known:
            known[line] = prepare(line)
            known[line]()  # compiled and warm
        start = time.perf_counter()
        known[line]()
        print(f"seconds {time.perf_counter() - start}", flush=True)


def medians(contenders: Mapping[str, Contender], asked: Sequence[tuple[str, str]], rounds: int) -> list[float]:
    """Of every (contender, line), taken by turns; the first round is not used."""
    times = [[contenders[name].seconds(line) for name, line in asked] for _ in range(rounds + 1)]
    found = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    for (name, line), seconds in zip(asked, found, strict=True):
        print(json.dumps({"contender": name, "asked": line, "seconds": seconds}), flush=True)
    return found

"""Compares many prompts in one executable to the same runs one after another.

    python -m experiments.benchmarks.vectorized [--seeds=8] [--size=small] [--parts=demo,step]

demo: runs the demo with `--seeds` seeds, once as `sweep --launcher=here` and once as a `train` process per seed. Both
  start with an empty cache of executables, which the `train` processes share, as they do by default; the tokens are
  cached. Both should give the same prompts, and the number of equal ones is reported.
step: runs training steps of T5 1.1 of size `--size` on random weights, with batch size 32, P=100, 128 input and 8
  target tokens, for one run and for `--seeds` runs in one executable.

The last line printed is one JSON object. Seconds are wall time, and peaks are the memory of one process. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH, INPUTS, TARGETS, PROMPT = 32, 128, 8, 100
ROUNDS = 3


def timed(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Runs a command, and returns its seconds and its peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def together(folder: Path, seeds: int, environment: dict[str, str]) -> tuple[float, float]:
    arguments = [f"--gin.SWEEP_DIR={str(folder)!r}", f"--gin.SEEDS={list(range(seeds))}", "--launcher=here"]
    return timed(["-m", "prompt_tuning_jax.sweep", "--gin_file=sweeps/demo.gin", *arguments], environment)


def one_after_another(folder: Path, seeds: int, environment: dict[str, str]) -> tuple[float, float]:
    runs = []
    for seed in range(seeds):
        arguments = [f"--gin.RANDOM_SEED={seed}", f"--gin.MODEL_DIR={str(folder / f'RANDOM_SEED={seed}')!r}"]
        runs.append(timed(["-m", "prompt_tuning_jax.train", "--gin_file=runs/demo.gin", *arguments], environment))
    seconds, peaks = zip(*runs, strict=True)
    return sum(seconds), max(peaks)


def demo(seeds: int) -> dict[str, Any]:
    """Measures the demo in both ways, each with an empty cache of executables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = ["--gin.TRAIN_STEPS=1", f"--gin.MODEL_DIR={str(folder / 'tokens')!r}"]
        timed(["-m", "prompt_tuning_jax.train", "--gin_file=runs/demo.gin", *tokens], compiled(folder / "unused"))
        record: dict[str, Any] = {}
        for way, run in (("together", together), ("one after another", one_after_another)):
            seconds, peak = run(folder / way, seeds, compiled(folder / f"compiled {way}"))
            record[way] = {"seconds": seconds, "peak_gb": peak}
            print(json.dumps({"way": way} | record[way]), flush=True)
        names = [f"RANDOM_SEED={seed}/prompts/300.npy" for seed in range(seeds)]
        same = [
            len({(folder / way / name).read_bytes() for way in ("together", "one after another")}) for name in names
        ]
        ratio = record["together"]["seconds"] / record["one after another"]["seconds"]
        return record | {"ratio": ratio, "same_prompts": same.count(1)}


def compiled(folder: Path) -> dict[str, str]:
    """Returns the environment of runs that keep their executables in `folder`."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder)}


def step(size: str, seeds: int) -> dict[str, Any]:
    """Returns the examples per second and the compilations of one run's step and of the joint step."""
    import jax
    import jax.numpy as jnp

    from experiments.sizes import SIZES
    from prompt_tuning_jax.batches.loader import Batch
    from prompt_tuning_jax.checkpoints.base import random_base
    from prompt_tuning_jax.methods.prompt_tuning import PROMPT as PATH
    from prompt_tuning_jax.methods.prompt_tuning import PromptTuning
    from prompt_tuning_jax.sweeps.shared_step import shared_step
    from prompt_tuning_jax.t5.network import Transformer
    from prompt_tuning_jax.training.optimizer import adafactor
    from prompt_tuning_jax.training.step import TrainState, make_train_step

    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
    )
    config = SIZES[size]
    model, method = Transformer(config), PromptTuning(PROMPT)
    frozen = random_base(config, 0).params
    rng = np.random.default_rng(0)
    optimizers = [adafactor(0.3) for _ in range(seeds)]

    def state(seed: int) -> TrainState:
        trainable = {PATH: jnp.asarray(rng.standard_normal((PROMPT, config.emb_dim), np.float32))}
        return TrainState(
            jnp.zeros((), jnp.int32),
            trainable,
            optimizers[0].init(trainable),
            jax.random.key_data(jax.random.key(seed)),
        )

    states = [state(seed) for seed in range(seeds + 1)]
    inputs, targets = (
        rng.integers(3, config.vocab_size, (seeds, BATCH, n)).astype(np.int32) for n in (INPUTS, TARGETS)
    )
    alone = make_train_step(model, method, optimizers[0])
    at_once = 1 if jax.default_backend() == "cpu" else seeds
    joint = shared_step(model, [method] * seeds, optimizers, [PROMPT] * seeds, at_once)
    jax.block_until_ready(states)
    own, many = states[-1], tuple(states[:seeds])
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    compiled = {}
    for number in range(ROUNDS + 1):
        before, start = len(compilations), time.perf_counter()
        own, metrics = alone(own, frozen, Batch(inputs[0], targets[0], np.arange(BATCH)))
        jax.block_until_ready((own, metrics))
        seconds["alone"].append(time.perf_counter() - start)
        middle, start = len(compilations), time.perf_counter()
        many, metrics = joint(many, frozen, inputs, targets)
        jax.block_until_ready((many, metrics))
        seconds["together"].append(time.perf_counter() - start)
        if not number:
            compiled = {"alone": middle - before, "together": len(compilations) - middle}
    rates = {
        way: rows / statistics.median(seconds[way][1:]) for way, rows in (("alone", BATCH), ("together", BATCH * seeds))
    }
    return {"examples_per_second": rates, "ratio": rates["together"] / rates["alone"], "compilations": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--size", default="small")
    parser.add_argument("--parts", default="demo,step")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    result = {"cores": len(os.sched_getaffinity(0)), "seeds": arguments.seeds}
    if "demo" in parts:
        result["demo"] = demo(arguments.seeds)
    if "step" in parts:
        result["step"] = {"size": arguments.size} | step(arguments.size, arguments.seeds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Measures the start-up of command lines: the time from the start of the process to its first useful result.

    python -m experiments.benchmarks.startup [--rounds=5] [--peer=peft]

It starts whole processes in turns, with the embedded base model and the demo's task, whose tokens are cached. The last
line printed is one JSON object with medians of wall time (`seconds`) and of CPU time (`cpu_seconds`), which depends
less on the machine's other load:

  first_step: until `train` has printed its first step, whose loss the host has read by then;
  first_answer: until `infer` has printed its first prediction, with its stdin still open;
  help: until `--help` has ended, by command line;
  import: until `import prompt_tuning_jax.train` has ended;
  peft: until the modules that a user of PEFT imports have been imported.

`warm` means that the executables are in JAX's cache on disk, and `cold` that this cache is empty. Linux only.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.contenders import random_prompt

HELPFUL = ("infer", "serve", "convert", "neighbors", "tasks")  # the command lines without gin files
PEER = "import torch; from transformers import T5ForConditionalGeneration; from peft import PeftModel"
ROW = {"prompt": "any", "inputs": "a joy to watch"}


def until_ended(command: Sequence[str], cache: Path) -> float:
    """Returns the seconds from the start of a Python process to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], env=environment(cache), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def until_first_step(folder: Path, cache: Path) -> float:
    """Returns the seconds from the start of the demo's training to the line about its first step."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        macros = {"MODEL_DIR": f"{run}/run", "TRAIN_STEPS": 1, "LOG_PERIOD": 1}
        arguments = ["--gin_file=runs/demo.gin", *(f"--gin.{name}={value!r}" for name, value in macros.items())]
        return until_line("train", arguments, cache, "stderr", "step 1 train: ")


def until_first_answer(folder: Path, cache: Path) -> float:
    """Returns the seconds from the start of `infer` to the prediction of one row, which it gets at once."""
    return until_line("infer", [f"--prompts={folder / 'prompts'}"], cache, "stdout", "{", json.dumps(ROW) + "\n")


def until_line(module: str, arguments: list[str], cache: Path, stream: str, begins: str, given: str = "") -> float:
    """Returns the seconds until a command line prints a line on `stream` that starts with `begins`; then kills it."""
    command = [sys.executable, "-m", f"prompt_tuning_jax.{module}", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, stream: subprocess.PIPE}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment(cache), text=True, **pipes) as process:
        assert process.stdin
        process.stdin.write(given)
        process.stdin.flush()
        lines = []
        for line in getattr(process, stream):
            lines.append(line)
            if line.startswith(begins):
                seconds = time.perf_counter() - started
                process.kill()
                return seconds
    raise RuntimeError(f"{module} ended with {process.returncode} and no line that begins {begins!r}: {lines[-3:]}")


def environment(cache: Path) -> dict[str, str]:
    """Returns the environment of a process that keeps its executables in `cache`."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def by_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Returns the medians of each measure's seconds, and of the CPU seconds of its processes.

    The first round is not used: it fills the caches.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for turn in range(rounds + 1):
        for name, measure in measures.items():
            before = processor_seconds()
            found = measure(), processor_seconds() - before
            print(json.dumps({"round": turn, "measure": name, **named(found)}), flush=True)
            if turn:
                times[name].append(found)
    return {
        name: named([statistics.median(column) for column in zip(*found, strict=True)]) for name, found in times.items()
    }


def named(found: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in zip(("seconds", "cpu_seconds"), found, strict=True)}


def processor_seconds() -> float:
    """Returns the CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=["peft"], help="needs the extra [hf]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        warm = folder / "compiled"
        (folder / "prompts").mkdir()
        np.save(folder / "prompts" / f"{ROW['prompt']}.npy", random_prompt(0, 20, "nano"))

        def cold(measure: Callable[[Path, Path], float]) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                return measure(folder, Path(empty))

        measures: dict[str, Callable[[], float]] = {
            "first_step warm": lambda: until_first_step(folder, warm),
            "first_step cold": lambda: cold(until_first_step),
            "first_answer warm": lambda: until_first_answer(folder, warm),
            "first_answer cold": lambda: cold(until_first_answer),
            "import": lambda: until_ended(["-c", "import prompt_tuning_jax.train"], warm),
        }
        for name in HELPFUL:
            command = ["-m", f"prompt_tuning_jax.{name}", "--help"]
            measures[f"help {name}"] = lambda command=command: until_ended(command, warm)
        if arguments.peer:
            measures[arguments.peer] = lambda: until_ended(["-c", PEER], warm)
        found = by_turns(measures, arguments.rounds)

    record = vars(arguments) | {name: medians for name, medians in found.items() if " " not in name}
    for name in ("first_step", "first_answer", "help"):
        record[name] = {key.split()[1]: medians for key, medians in found.items() if key.startswith(f"{name} ")}
    print(json.dumps(record))


if __name__ == "__main__":
    main()

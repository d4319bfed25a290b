"""Groups sweep runs into compiled programs, limiting padding and memory."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.methods.method import tasks_of
from prompt_tuning_jax.sweeps.shared_step import step_of
from prompt_tuning_jax.training.memory_plan import SPARE_MEMORY, free_bytes
from prompt_tuning_jax.training.run import Run

# Positions that a program computes for all its runs, over those that the runs would alone. An accelerator is not full
# with one run: padding costs it little.
MOST_PADDING = 2.0
MOST_PADDING_ON_CPU = 1.1
PLANNED = 64  # batches that padding is estimated from


class Program(NamedTuple):
    """Runs that share a program, and how many of them share a pass."""

    runs: list[Run]
    at_once: int


def programs(runs: Sequence[Run], most: int | None = None) -> Iterator[Program]:
    """Divides runs into programs.

    Args:
      most: runs that share a pass, however much they pad each other. None: such as pad each other little share a
        program, and as many share a pass as there is memory for; on CPU, which is full with one, each has its own.
    """
    cpu = jax.default_backend() == "cpu"
    limit = np.inf if most is not None else MOST_PADDING_ON_CPU if cpu else MOST_PADDING
    shapes = {run: np.array(run.batches.shapes(PLANNED)) for run in runs}  # [batches, 2]: T and U
    together: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.prompt_length + shapes[run][:, 0].mean()):
        if not together or padding([*together[-1], run], shapes) > limit:
            together.append([])
        together[-1].append(run)
    for group in together:
        widest = np.max([shapes[run].max(axis=0) for run in group], axis=0).tolist()
        yield Program(group, min(most or (1 if cpu else fitting(group, widest)), len(group)))


def padding(runs: Sequence[Run], shapes: Mapping[Run, np.ndarray]) -> float:
    """Encoder positions of the runs' batches padded to each other, over those of their own batches."""
    widths = np.array([shapes[run][:, 0] for run in runs])
    lengths = np.array([[run.prompt_length] for run in runs])
    joint = len(runs) * np.sum(lengths.max() + widths.max(axis=0))
    return float(joint / np.sum(lengths + widths))


def fitting(runs: Sequence[Run], widest: Sequence[int]) -> int:
    """How many of the runs may share a pass: on the widest batch it must take less memory than is free."""
    free = free_bytes()
    if len(runs) == 1 or free is None:
        return len(runs)
    taken = step_bytes(runs, widest)
    if taken <= SPARE_MEMORY * free:
        return len(runs)
    size = max(1, int(len(runs) * SPARE_MEMORY * free / taken))
    gib = f"take {taken / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    print(f"{len(runs)} runs at once {gib}: {size} at a time", file=sys.stderr)
    return size


def step_bytes(runs: Sequence[Run], widest: Sequence[int]) -> int:
    """Bytes that a pass of these runs takes besides its arguments, as compiled for batches of `widest` (T, U)."""
    rows = (len(runs), runs[0].config.train_dataset.batch_size)
    arrays = [jax.ShapeDtypeStruct((*rows, width), jnp.int32) for width in widest]
    if tasks_of(runs[0].config.method) is not None:
        arrays.append(jax.ShapeDtypeStruct(rows, jnp.int32))
    compiled = step_of(runs, len(runs)).lower(tuple(run.state for run in runs), runs[0].frozen, *arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

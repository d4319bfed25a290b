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

# The largest ratio of the positions that one executable computes for all its runs to those that the runs would compute
# alone. One run does not fully use an accelerator, so padding costs little there.
MOST_PADDING = 2.0
MOST_PADDING_ON_CPU = 1.1
PLANNED = 64  # how many batches padding is estimated from


class Program(NamedTuple):
    """Holds runs that share one executable, and how many of them are vmapped into one forward and backward pass."""

    runs: list[Run]
    at_once: int


def programs(runs: Sequence[Run], most: int | None = None) -> Iterator[Program]:
    """Divides runs into programs.

    Args:
      most: the largest number of runs per pass; all runs then share one executable, however much padding that needs.
        None: only runs that need little padding share an executable, and a pass has as many runs as fit in memory. On
        CPU, which one run uses fully, a pass then has one run.
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
        yield Program(group, min(most or (1 if cpu else runs_per_pass(group, widest)), len(group)))


def padding(runs: Sequence[Run], shapes: Mapping[Run, np.ndarray]) -> float:
    """Returns how many times more encoder positions the runs have if padded to each other than each has alone."""
    widths = np.array([shapes[run][:, 0] for run in runs])
    lengths = np.array([[run.prompt_length] for run in runs])
    joint = len(runs) * np.sum(lengths.max() + widths.max(axis=0))
    return float(joint / np.sum(lengths + widths))


def runs_per_pass(runs: Sequence[Run], widest: Sequence[int]) -> int:
    """Returns how many of the runs fit in one pass on the widest batch, given the free memory."""
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
    """Returns the bytes that a pass of these runs needs besides its arguments, for batches of `widest` (T, U)."""
    rows = (len(runs), runs[0].config.train_dataset.batch_size)
    arrays = [jax.ShapeDtypeStruct((*rows, width), jnp.int32) for width in widest]
    if tasks_of(runs[0].config.method) is not None:
        arrays.append(jax.ShapeDtypeStruct(rows, jnp.int32))
    compiled = step_of(runs, len(runs)).lower(tuple(run.state for run in runs), runs[0].frozen, *arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

"""Tokenises a SeqIO task or mixture without end and writes it to a pipe, which `loader.StreamedBatches` reads.

It runs as `python -m prompt_tuning_jax.batches.stream REQUEST`. It waits while the pipe is full.
"""

import dataclasses
import io
import json
import os
import struct
import sys
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.batches.build import find_task, task_splits
from prompt_tuning_jax.batches.cache import TaskRequest, with_split
from prompt_tuning_jax.batches.child import end_with_parent, user_errors
from prompt_tuning_jax.batches.mixing import Mixing
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.find import makes_lengths

PIPE = 1 << 20  # size of the pipe in bytes: the largest that Linux allows a user by default
CHUNK = 64  # examples per batch that is taken from TensorFlow

Tokens = tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]


def stream(request: TaskRequest, split: str, seed: int, start: int) -> Iterator[Tokens]:
    """Yields examples `start`, `start + 1` and so on of the endless stream of a task, or of a mixture's tasks by rate.

    Raises:
      ValueError: there is no such task or split, or its data is invalid.
    """
    tasks = with_split(request, task_splits(request), split, True)
    mixing = Mixing([one.rate for one in tasks.values()], seed)
    streams = [
        _examples(dataclasses.replace(request, name=name), split, seed, int(skip))
        for name, skip in zip(tasks, mixing.counts(start), strict=True)
    ]
    for task in mixing.draws(start):
        yield next(streams[task])


def _examples(request: TaskRequest, split: str, seed: int, skip: int) -> Iterator[Tokens]:
    task = find_task(request)
    sources.set_data_dir(request.data_dir)
    lengths = dict(request.feature_lengths) if makes_lengths(task) else None
    with sources.source_errors():
        examples = task.get_dataset(
            lengths, split, shuffle=True, seed=seed, num_epochs=None, trim_output_features=False
        )
        examples = examples.map(lambda example: {name: example[name] for name in ("inputs", "targets")})
        for batch in examples.skip(skip).ragged_batch(CHUNK):
            columns = []
            for name in ("inputs", "targets"):
                ends = batch[name].row_splits.numpy()[1:-1]
                columns.append(np.split(batch[name].flat_values.numpy().astype(np.int32), ends))
            yield from zip(*columns, strict=True)
    raise SettingError(
        f"{split} of {request.name} has no examples: set ", Setting("train_split"), " to a split with rows"
    )


def write(examples: Iterator[Tokens], pipe: io.BufferedIOBase) -> None:
    """Writes the examples in the format that `StreamedBatches` reads, until the reader closes the pipe."""
    try:
        for inputs, targets in examples:
            pipe.write(struct.pack("<II", len(inputs), len(targets)))
            pipe.write(np.concatenate([inputs, targets]).astype("<i4").tobytes())
    except BrokenPipeError:
        os._exit(0)


def main() -> None:
    end_with_parent()
    # Only the examples may go into the pipe, so anything that a library prints is redirected to stderr.
    pipe = os.fdopen(os.dup(1), "wb", buffering=1 << 16)
    os.dup2(2, 1)
    _enlarge_pipe(pipe.fileno())
    child_request = json.loads(sys.argv[1])
    try:
        write(
            stream(
                TaskRequest.from_json(child_request["request"]),
                child_request["split"],
                child_request["seed"],
                child_request["start"],
            ),
            pipe,
        )
    except ValueError as error:
        user_errors(error)


def _enlarge_pipe(pipe: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
    except (ImportError, AttributeError, OSError):
        pass  # the system cannot resize pipes; the stream then reads ahead less


if __name__ == "__main__":
    main()

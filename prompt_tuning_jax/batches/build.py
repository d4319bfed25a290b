"""Tokenises one split of a SeqIO task into the cache. The only part of `batches` that imports TensorFlow.

Run by `cache.load_split` as `python -m prompt_tuning_jax.batches.build ORDER`, with a JSON object of `TaskRequest`'s
fields, `split` and `folder`. Exit code 2 and one line on stderr is the user's error.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.tasks import TASK_MODULES, sources
from prompt_tuning_jax.tasks.vocabularies import seqio_vocabulary


def build_split(request: TaskRequest, split: str, folder: Path) -> None:
    """Writes `folder`, whole or not at all. A folder that another process finished meanwhile stands."""
    task = find_task(request)
    if split not in task.splits:
        raise ValueError(
            f"{request.name} has no split {split!r}, only {', '.join(task.splits)}: set TRAIN_SPLIT or EVAL_SPLIT"
        )
    sources.set_data_dir(request.data_dir)
    # Tokens are kept uncut, so that what TASK_FEATURE_LENGTHS cuts can be counted; only a preprocessor that
    # makes examples of a given length is told the lengths.
    lengths = dict(request.feature_lengths) if _makes_lengths(task) else None
    examples = task.get_dataset(lengths, split, shuffle=False, seed=0, trim_output_features=False)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder.parent} ({error.strerror}): set CACHE_DIR to a folder that can be written"
        ) from None
    try:
        _write(examples, task, partial)
        _move(partial, folder)
    except tf.errors.OpError as error:
        raised = re.search(r"ValueError: (.*)", str(error))  # by a source, in the middle of TensorFlow's own report
        if not raised:
            raise
        raise ValueError(raised[1]) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Puts a whole split in its place; one that another process finished meanwhile stands, a broken one does not."""
    if folder.exists() and not (folder / "task.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.rename(partial, folder)
    except OSError:
        if not (folder / "task.json").exists():
            raise


def find_task(request: TaskRequest) -> seqio.Task:
    """The registered task, with the request's vocabulary in place of its own.

    Raises:
      ValueError: no such task, with near misses; or no such module.
    """
    for module in (*TASK_MODULES, *request.modules):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or " "):
                raise
            raise ValueError(f"no module {module}: set MIXTURE_OR_TASK_MODULE to one that Python finds") from None
    names = sorted(seqio.TaskRegistry.names())
    if request.name not in names:
        near = difflib.get_close_matches(request.name, names, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names)}."
        raise ValueError(f"no task {request.name!r}; {hint} Set MIXTURE_OR_TASK_NAME")
    task = seqio.TaskRegistry.get(request.name)
    vocabulary = seqio_vocabulary(request.vocabulary)
    return seqio.Task(
        task.name,
        source=task.source,
        preprocessors=task.preprocessors,
        output_features={
            name: dataclasses.replace(feature, vocabulary=vocabulary) for name, feature in task.output_features.items()
        },
        postprocess_fn=task.postprocessor,
        metric_fns=task.metric_fns,
    )


def _makes_lengths(task: seqio.Task) -> bool:
    own = (step for step in task.preprocessors if not getattr(step, "__module__", "").startswith("seqio."))
    return any("sequence_length" in inspect.signature(step).parameters for step in own)


def describe(function: Callable) -> dict[str, Any]:
    """A function, or a partial of one, by name and options, as `cache` calls it again.

    Raises:
      ValueError: it is no function of a module.
    """
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise ValueError(f"{function} has positional options: bind them by name so that a cache can record them")
        options = function.keywords | options
        function = function.func
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__} is local: move it to a module so that a cache can name it")
    return {"function": f"{function.__module__}:{function.__qualname__}", "options": options}


def _write(examples: tf.data.Dataset, task: seqio.Task, folder: Path) -> None:
    """Writes the files that `cache` lists. Batches cross into Python a thousand at a time: one by one is slow."""
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in ("inputs", "targets")}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in tokens}
    fields_path = folder / "fields.jsonl"
    with open(fields_path, "w", encoding="utf-8") as fields:
        for batch in examples.ragged_batch(1024):
            for name in tokens:
                tokens[name].append(batch[name].flat_values.numpy().astype(np.int32))
                lengths[name].append(batch[name].row_lengths().numpy())
            columns = {name: _plain(value) for name, value in batch.items() if name not in tokens}
            for values in zip(*columns.values(), strict=True):
                fields.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
    if not fields_path.stat().st_size:
        fields_path.unlink()
    count = sum(map(len, lengths["inputs"]))
    for name in tokens:
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, np.int32), *tokens[name]]))
        np.save(folder / f"{name}_ends.npy", np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths[name]])))
    postprocessor = task.postprocessor
    (folder / "task.json").write_text(
        json.dumps(
            {
                "name": task.name,
                "examples": count,
                "postprocessor": describe(postprocessor) if postprocessor else None,
                "metrics": [describe(metric) for metric in task.metric_fns],
            },
            indent=1,
        )
    )


def _plain(batch: tf.Tensor | tf.RaggedTensor) -> list:
    """The rows of a batch as JSON can hold them."""

    def text(value: Any) -> Any:
        return (
            value.decode("utf-8")
            if isinstance(value, bytes)
            else [*map(text, value)]
            if isinstance(value, list)
            else value
        )

    rows = batch.to_list() if isinstance(batch, tf.RaggedTensor) else batch.numpy().tolist()
    return [text(row) for row in rows]


def main() -> None:
    order = json.loads(sys.argv[1])
    split, folder = order.pop("split"), Path(order.pop("folder"))
    try:
        build_split(TaskRequest(**order | {"modules": tuple(order["modules"])}), split, folder)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

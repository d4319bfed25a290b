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
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import seqio

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

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder.parent))
    try:
        _write(examples.as_numpy_iterator(), task, partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / "task.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names)}"
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


def _write(examples, task: seqio.Task, folder: Path) -> None:
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in ("inputs", "targets")}
    fields_path = folder / "fields.jsonl"
    with open(fields_path, "w", encoding="utf-8") as fields:
        kept_any = False
        for example in examples:
            for name, rows in tokens.items():
                rows.append(np.asarray(example[name], np.int32))
            kept = {name: _plain(value) for name, value in example.items() if name not in tokens}
            kept_any = kept_any or bool(kept)
            fields.write(json.dumps(kept) + "\n")
    if not kept_any:
        fields_path.unlink()
    for name, rows in tokens.items():
        np.save(folder / f"{name}.npy", np.concatenate(rows) if rows else np.zeros(0, np.int32))
        np.save(folder / f"{name}_ends.npy", np.cumsum([len(row) for row in rows], dtype=np.int64))
    postprocessor = task.postprocessor
    (folder / "task.json").write_text(
        json.dumps(
            {
                "name": task.name,
                "examples": len(tokens["inputs"]),
                "postprocessor": describe(postprocessor) if postprocessor else None,
                "metrics": [describe(metric) for metric in task.metric_fns],
            },
            indent=1,
        )
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    value = np.asarray(value)
    if value.dtype == object:
        return [_plain(item) for item in value.reshape(-1)]
    return value.tolist()


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

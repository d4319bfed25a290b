"""Tokenises splits of a SeqIO task, or of each task of a mixture, into the cache.

Only this module and `stream` import TensorFlow in `batches`. `cache.load_tasks` runs it as
`python -m prompt_tuning_jax.batches.build ORDER`, where ORDER has the request, the splits and the cache as JSON.
It reports progress on stdout. After a user's error it exits with code 2, with one line on stderr.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.batches.cache import (
    PathState,
    TaskRequest,
    TaskSplits,
    content_hash,
    file_state,
    names_path,
    open_current,
    open_or_why,
    split_folder,
    with_hash,
    with_split,
)
from prompt_tuning_jax.batches.child import end_with_parent, user_errors
from prompt_tuning_jax.batches.examples import describe
from prompt_tuning_jax.batches.lock import lock
from prompt_tuning_jax.errors import NO_ROOM, Setting, SettingError
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tasks.find import find, makes_lengths, with_vocabulary


def build_missing(request: TaskRequest, split: str, root: Path, to_train: bool) -> None:
    """Tokenises `split` of every task of the request that has it, unless the cache has an up-to-date copy.

    If another process is building a split, this process waits and then uses its result.
    """
    tasks = task_splits(request)
    for task in with_split(request, tasks, split, to_train):
        folder = split_folder(request, task, split, root)
        with _writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _lock(folder, f"{task}, {split}"):
                if isinstance(why := open_or_why(folder), str):
                    again = f" again, since {why}" if folder.exists() else ""
                    print(f"tokenising {task}, {split}{again} (once; kept in {folder})", flush=True)
                    build_split(dataclasses.replace(request, name=task), split, folder)
        finally:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # succeeds only if the folder is empty: the split was not built
    path = names_path(request, root)
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(with_hash({"tasks": {task: one._asdict() for task, one in tasks.items()}}))
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)


@contextlib.contextmanager
def _lock(folder: Path, what: str) -> Iterator[None]:
    def waiting(owner: str) -> None:
        print(f"waiting for {owner}, which tokenises {what}", flush=True)

    with contextlib.ExitStack() as stack:
        with _writing(folder.parent):
            stack.enter_context(lock(folder.with_name(f".{folder.name}.lock"), waiting))
        yield


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns an OSError into a SettingError that says what the user can do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in NO_ROOM:
            raise SettingError(
                f"no room for the cache {folder} ({reason}): free some, or set ",
                Setting("cache_dir"),
                " to a disk that has it",
            ) from None
        raise SettingError(
            f"cannot write to {folder} ({reason}): set ", Setting("cache_dir"), " to a folder that can be written"
        ) from None


def build_split(request: TaskRequest, split: str, folder: Path) -> None:
    """Writes one split of one task to `folder`, atomically."""
    task = find_task(request)
    with_split(request, {task.name: TaskSplits(1.0, tuple(task.splits))}, split, False)
    sources.set_data_dir(request.data_dir)
    with _files_read(request, task, split, folder.parent) as read:
        # Tokens are cached untruncated, so that the rows that TASK_FEATURE_LENGTHS truncates can be counted. Only a
        # preprocessor that makes examples of a given length gets the lengths.
        lengths = dict(request.feature_lengths) if makes_lengths(task) else None
        with _writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with sources.source_errors():
                examples = task.get_dataset(lengths, split, shuffle=False, seed=0, trim_output_features=False)
                _write(examples, task, partial, read)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, folder: Path) -> None:
    """Moves a complete split to `folder`, unless another process has put an up-to-date one there in the meantime."""
    with _writing(folder.parent):
        if folder.exists() and open_current(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(partial, folder)
        except OSError:
            if open_current(folder) is None:
                raise


READ_EVENTS = ("open", "os.scandir", "os.listdir")
_opened: dict[str, PathState | None] | None = None


def _record_opened(event: str, arguments: tuple) -> None:
    if _opened is None or not isinstance(arguments[0], str | Path):
        return
    if event == "open" and _is_write(*arguments[1:]):
        return
    path = os.path.abspath(arguments[0])
    if path not in _opened:
        _opened[path] = None  # looking at it is noted, too
        _opened[path] = _state_before_reading(path)


def _is_write(mode: str | None, flags: int) -> bool:
    """Whether a file is opened to be written, by `open` or by `os.open`."""
    return bool(flags & os.O_ACCMODE) if mode is None else bool(set(mode) & set("wax+"))


def _state_before_reading(path: str) -> PathState:
    """Returns a file as it is before it is read: the content of a folder alone, whose names are few bytes."""
    return PathState(file_state(path), content_hash(path) if os.path.isdir(path) else None)


@functools.cache
def _watch_opens() -> None:
    """Installs the audit hook. It cannot be removed, and Python calls it for events of every kind.

    At exit, Python still calls it when this module's names are None already, so the hook holds what it needs.
    """
    events, record = READ_EVENTS, _record_opened
    sys.addaudithook(lambda event, arguments: event in events and record(event, arguments))


@contextlib.contextmanager
def _files_read(request: TaskRequest, task: seqio.Task, split: str, cache: Path) -> Iterator[Callable[[], dict]]:
    """Yields a function that returns the `PathState` of each user file opened and folder listed in this context.

    Python's audit events report every file that is opened. So a cached split depends on the files that its task reads
    and on no other file under DATA_DIR, whatever the task's source is. A link under DATA_DIR counts by its own name: it
    may lead out of DATA_DIR, and later to another file. The files of SeqIO's own sources, which TensorFlow opens, count
    wherever they are. Files in `cache` are left out, even if it is under DATA_DIR.
    """
    global _opened
    shards = _shards(task, split)

    def read() -> dict[str, Any]:
        found = {}
        for path, before in [*(_opened or {}).items()]:
            name = path if path in shards else _path_under(request.data_dir, path)
            if name is None or before is None or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache)):
                continue
            found[name] = PathState(before.state, before.content or content_hash(path))
            if not before._replace(content=before.content or "").is_unchanged(path):
                raise ValueError(f"{path} changes while it is tokenised: start again when it rests")
        return dict(sorted(found.items()))

    _watch_opens()
    _opened = {path: _state_before_reading(path) for path in shards}
    try:
        yield read
    finally:
        _opened = None


def _path_under(top: str | None, path: str) -> str | None:
    """Returns the path of a file under DATA_DIR, in which only the links above DATA_DIR are resolved; else None."""
    if top is None:
        return None
    real = os.path.realpath(top)
    for found in (path, os.path.realpath(path)):
        for start in (os.path.abspath(top), real):
            if Path(found).is_relative_to(start):
                return os.path.normpath(os.path.join(real, os.path.relpath(found, start)))
    return None


def _shards(task: seqio.Task, split: str) -> set[str]:
    """Returns the files on this machine's disks that a task's source names to SeqIO, and their folders."""
    if not isinstance(task.source, seqio.FileDataSource):
        return set()
    files = {os.path.abspath(path) for path in task.source.list_shards(split) if os.path.isfile(path)}
    return files | {os.path.dirname(path) for path in files}  # where another file may fit the source's pattern, too


def task_splits(request: TaskRequest) -> dict[str, TaskSplits]:
    """Returns the rates and splits of the tasks in the request's mixture, or of its one task.

    Raises:
      ValueError: there is no such task or mixture, its examples cannot be cached, or its rates or splits cannot be
        determined.
    """
    provider = find(request.name, request.modules)
    for task in provider.tasks if isinstance(provider, seqio.Mixture) else [provider]:
        _check_features(task)
    sources.set_data_dir(request.data_dir)
    try:
        if isinstance(provider, seqio.Mixture):
            return {one.name: TaskSplits(provider.get_rate(one), tuple(one.splits)) for one in provider.tasks}
        return {provider.name: TaskSplits(1.0, tuple(provider.splits))}
    except Exception as error:  # rates and splits may come from TFDS, which raises errors of many libraries
        reason = str(error).strip().partition("\n")[0]
        raise SettingError(
            f"cannot read the mixing rates and splits of {request.name} ({reason}): set ",
            Setting("data_dir"),
            " to the folder that holds the task's files",
        ) from error


def _check_features(task: seqio.Task) -> None:
    """Raises ValueError if the inputs or the targets of an example are not a one-dimensional list of ids."""
    for name in ("inputs", "targets"):
        feature = task.output_features.get(name)
        if feature is None or feature.rank != 1 or not feature.dtype.is_integer:
            found = f"{feature.dtype.name} of rank {feature.rank}" if feature else "absent"
            raise SettingError(
                f"the {name} of {task.name} are {found}, expected token ids (integers of rank 1): set ",
                Setting("mixture_or_task_name"),
                " to another task",
            )


def find_task(request: TaskRequest) -> seqio.Task:
    """Returns the registered task with the request's vocabulary instead of its own.

    Raises:
      ValueError: there is no such task (the message has near misses), or no such module.
    """
    task = find(request.name, request.modules)
    if isinstance(task, seqio.Mixture):
        raise SettingError(
            f"{task.name} is a mixture of tasks: set ", Setting("mixture_or_task_name"), " to one of them"
        )
    return with_vocabulary(task, request.vocabulary, request.eos_id)


def _write(examples: tf.data.Dataset, task: seqio.Task, folder: Path, read: Callable[[], dict[str, Any]]) -> None:
    """Writes the files that the docstring of `cache` lists, in batches of 1024 examples, since one by one is slow."""
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in ("inputs", "targets")}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in tokens}
    fields_path = folder / "fields.jsonl"
    with _writing(folder.parent):
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
        for name in tokens:
            np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, np.int32), *tokens[name]]))
            np.save(folder / f"{name}_ends.npy", np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths[name]])))
        postprocessor = task.postprocessor
        description = {
            "name": task.name,
            "examples": sum(map(len, lengths["inputs"])),
            "postprocessor": describe(postprocessor) if postprocessor else None,
            "metrics": [describe(metric) for metric in task.metric_fns],
            "sizes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
            "hashes": {path.name: content_hash(path) for path in sorted(folder.iterdir())},
            "read": read(),
        }
        (folder / "task.json").write_text(json.dumps(with_hash(description), indent=1))


def _plain(batch: tf.Tensor | tf.RaggedTensor) -> list:
    """Returns the rows of a batch as values that JSON can hold."""

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
    end_with_parent()
    order = json.loads(sys.argv[1])
    try:
        request, root = TaskRequest.from_json(order["request"]), Path(order["cache_dir"])
        build_missing(request, order["split"], root, order["to_train"])
        for split in order["then"]:
            build_missing(request, split, root, False)
    except ValueError as error:
        user_errors(error)


if __name__ == "__main__":
    main()

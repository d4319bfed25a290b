"""Tokenised splits on disk, and how to read them: NumPy alone.

A split that is not there yet, or no longer what its files hold, is built by `batches.build` in a process of its own, so
that TensorFlow's memory and start-up are paid once and never by a training host.

    <cache>/names/<name>-<fingerprint>.json     what a name holds: its tasks, their rates and splits
    <cache>/<task>-<fingerprint>/<split>/
        task.json       what scores the task: postprocessor and metrics by name; the count of examples; the files that
                        were read, and these files' sizes
        inputs.npy      int32, all examples one after another; inputs_ends.npy, int64, where each one ends
        targets.npy, targets_ends.npy
        fields.jsonl    what else the task keeps of each example, in order; absent where it keeps nothing
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

import prompt_tuning_jax
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tasks.vocabularies import Vocabulary

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """What decides a task's tokens.

    Attributes:
      name: of a SeqIO task or mixture.
      vocabulary: path of the SentencePiece model, or 'bytes'.
      feature_lengths: TASK_FEATURE_LENGTHS, "inputs" and "targets", end of sequence included.
      data_dir: the benchmark's own files; None for TFDS.
      modules: imported to register tasks, beside this project's own.
      files: the rows of a task that no module registers; None for one that is registered.
    """

    name: str
    vocabulary: str
    feature_lengths: Mapping[str, int]
    data_dir: str | None = None
    modules: tuple[str, ...] = ()
    files: TaskFiles | None = None

    def order(self, **more: Any) -> dict[str, Any]:
        """As JSON can hold it, with what else a child must know."""
        return {"request": dataclasses.asdict(self), **more}

    @classmethod
    def from_order(cls, fields: Mapping[str, Any]) -> "TaskRequest":
        files = fields["files"] and TaskFiles(**fields["files"])
        return cls(**{**fields, "modules": tuple(fields["modules"]), "files": files})

    def fingerprint(self) -> str:
        """Changes with the task, the vocabulary, the lengths, the place of the files and the code that reads them.

        What lies in the files is compared where a split is read: `Examples.is_current`.
        """
        place = self.data_dir and os.path.realpath(self.data_dir)
        lengths = sorted(self.feature_lengths.items())
        return _digest(self._definition(), Vocabulary(self.vocabulary).fingerprint, lengths, place)

    def names_fingerprint(self) -> str:
        """Changes with what may change the tasks of a name."""
        return _digest(self._definition())

    def _definition(self) -> list:
        code = hashlib.sha256()
        for path in sorted(Path(prompt_tuning_jax.__file__).parent.glob("tasks/*.py")):
            if path.name != "__main__.py":
                code.update(path.read_bytes())
        files = self.files and dataclasses.asdict(self.files)
        modules = [(name, _source_fingerprint(name)) for name in self.modules]
        return [FORMAT, self.name, modules, files, code.hexdigest()]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _source_fingerprint(module: str) -> str | None:
    """Of the file that Python would import, which stays unimported here; None where there is none."""
    stem = module.replace(".", "/")
    found = (Path(p or ".", f"{stem}{end}") for p in sys.path for end in ("/__init__.py", ".py"))
    source = next((path for path in found if path.is_file()), None)
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None


def file_state(path: str | os.PathLike) -> list[int] | None:
    """A file's size and time of change, or a folder's (which its entries change); None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [0 if os.path.isdir(path) else found.st_size, found.st_mtime_ns]


class Ragged:
    """Rows of different lengths in one memory-mapped array."""

    def __init__(self, folder: Path, name: str):
        self._flat = np.load(folder / f"{name}.npy", mmap_mode="r")
        ends = np.load(folder / f"{name}_ends.npy")
        self._starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.lengths: Int[np.ndarray, " n"] = ends - self._starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int | np.integer) -> Int[np.ndarray, " length"]:
        start = self._starts[row]
        return self._flat[start : start + self.lengths[row]]


class Examples:
    """A split, or a slice of one: tokens by position, and what scores them.

    Attributes:
      inputs, targets: token ids, end of sequence included, before any cut.
      rows: which rows of them, in order.
    """

    def __init__(self, folder: Path, rows: slice = slice(None)):
        """Opens the files in `folder`.

        Raises:
          ValueError: they are not whole.
        """
        self._folder = folder
        try:
            self._task = json.loads((folder / "task.json").read_text())
            self.inputs, self.targets = Ragged(folder, "inputs"), Ragged(folder, "targets")
            whole = len(self.inputs) == len(self.targets) == self._task["examples"]
            whole &= all((folder / name).stat().st_size == size for name, size in self._task.get("sizes", {}).items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the cache {folder} cannot be read ({error}): delete the folder") from None
        if not whole:
            raise ValueError(f"the cache {folder} is not whole: delete the folder")
        self.rows = np.arange(len(self.inputs))[rows]
        self._slice = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> "Examples":
        """A slice of the whole split."""
        return Examples(self._folder, rows)

    @property
    def is_current(self) -> bool:
        """Whether the files that were read, and the folders that were searched for them, are as they were."""
        return all(file_state(path) == state for path, state in self._task.get("read", {}).items())

    @functools.cached_property
    def fields(self) -> list[dict[str, Any]]:
        """What the task keeps of each example beside its tokens; "targets_pretokenized" among it."""
        path = self._folder / "fields.jsonl"
        if not path.exists():
            return [{} for _ in self.rows]
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines][self._slice]

    @functools.cached_property
    def postprocess(self) -> Callable[..., Any]:
        """The task's postprocessor, `(text, example=...) -> what the metrics compare`."""
        return _function(self._task["postprocessor"]) if self._task["postprocessor"] else lambda text, **_: text

    @functools.cached_property
    def metrics(self) -> list[Callable[[Sequence, Sequence], dict[str, float]]]:
        """Each `(targets, predictions) -> {name: per cent}`; none for a pre-training task."""
        return [_function(spec) for spec in self._task["metrics"]]

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set of answers, where the task has one."""
        spec = self._task["postprocessor"]
        return tuple(spec["options"]["labels"]) if spec and "labels" in spec["options"] else None

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """The task's metrics of decoded texts, one for each row in order."""
        pairs = [
            (self.postprocess(fields["targets_pretokenized"], example=fields, is_target=True), fields, text)
            for fields, text in zip(self.fields, predictions, strict=True)
        ]
        targets = [target for target, _, _ in pairs]
        answers = [self.postprocess(text, example=fields, is_target=False) for _, fields, text in pairs]
        return {name: value for metric in self.metrics for name, value in metric(targets, answers).items()}

    def cut(self, lengths: Mapping[str, int]) -> dict[str, int]:
        """How many rows' inputs and targets are longer than `lengths`."""
        return {
            name: int((part.lengths[self.rows] > lengths[name]).sum())
            for name, part in (("inputs", self.inputs), ("targets", self.targets))
        }


def _function(spec: Mapping[str, Any]) -> Callable:
    module, name = spec["function"].rsplit(":", 1)
    return functools.partial(getattr(importlib.import_module(module), name), **spec["options"])


class Part(NamedTuple):
    """One task of a mixture, or the one that a task is.

    Attributes:
      rate: how often training draws from it, in any unit; 0 where it is for evaluation only.
    """

    rate: float
    examples: Examples


def load_tasks(
    request: TaskRequest, split: str, cache_dir: str | os.PathLike | None = None, *, to_train: bool = False
) -> dict[str, Part]:
    """The examples of `split` of every task that has it, tokenised first where the cache has not got them.

    Args:
      split: a split's name, or a slice of one as in TFDS: "train[:-2000]".
      cache_dir: `default_cache_dir()` where None.
      to_train: leave out tasks of rate 0.

    Raises:
      ValueError: a task, split or data is not there or not sound; the message says what to set.
    """
    name, rows = split_rows(split)
    root = Path(cache_dir or default_cache_dir())
    if request.data_dir is not None and not os.path.isdir(request.data_dir):
        raise ValueError(f"no folder {request.data_dir}: set DATA_DIR to the folder that holds the task's files")
    found = _find(request, name, root, to_train)
    if found is None:
        order = request.order(split=name, cache_dir=str(root), to_train=to_train)
        Child("prompt_tuning_jax.batches.build", order, f"tokenising {request.name}, {name}").finish()
        found = _find(request, name, root, to_train)
        if found is None:
            raise ValueError(f"the files of {request.name} change while they are tokenised: start again when they rest")
    parts = {task: Part(rate, examples[rows]) for task, (rate, examples) in found.items()}
    for task, part in parts.items():
        if not len(part.examples):
            raise ValueError(f"split {split!r} of {task} is empty: set TRAIN_SPLIT and EVAL_SPLIT to splits with rows")
    return parts


def load_split(request: TaskRequest, split: str, cache_dir: str | os.PathLike | None = None) -> Examples:
    """The examples of `split` of the one task that has it: `load_tasks`.

    Raises:
      ValueError: also where several tasks of a mixture have it.
    """
    parts = load_tasks(request, split, cache_dir)
    if len(parts) > 1:
        raise ValueError(f"{request.name} has several tasks with {split}: set MIXTURE_OR_TASK_NAME to one of them")
    return next(iter(parts.values())).examples


def split_rows(split: str) -> tuple[str, slice]:
    """A split's name, and which of its rows."""
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if not match:
        raise ValueError(
            f"split {split!r}, expected a name or a slice such as train[:-2000]: set TRAIN_SPLIT or EVAL_SPLIT"
        )
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def default_cache_dir() -> Path:
    """`$PROMPT_TUNING_CACHE`, or a folder of this project's in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROMPT_TUNING_CACHE") or Path(home, "prompt_tuning_jax")) / "tasks"


class Held(NamedTuple):
    """What is known of one task of a name, without SeqIO."""

    rate: float
    splits: tuple[str, ...]


def names_path(request: TaskRequest, root: Path) -> Path:
    """Where the cache says what the request's name holds."""
    return root / "names" / f"{request.name}-{request.names_fingerprint()}.json"


def split_folder(request: TaskRequest, task: str, split: str, root: Path) -> Path:
    """Where the cache keeps a split of one of the request's tasks."""
    return root / f"{task}-{dataclasses.replace(request, name=task).fingerprint()}" / split


def with_split(request: TaskRequest, held: Mapping[str, Held], split: str, to_train: bool) -> dict[str, Held]:
    """The tasks that have `split`, and for training a rate.

    Raises:
      ValueError: none has.
    """
    having = {task: one for task, one in held.items() if split in one.splits}
    if not having:
        there = dict.fromkeys(name for one in held.values() for name in one.splits)
        raise ValueError(
            f"{request.name} has no split {split!r}, only {', '.join(there)}: set TRAIN_SPLIT or EVAL_SPLIT"
        )
    if to_train:
        having = {task: one for task, one in having.items() if one.rate > 0}
        if not having:
            raise ValueError(f"{request.name} gives no task with {split!r} a rate above 0: set MIXTURE_OR_TASK_NAME")
    return having


def open_current(folder: Path) -> Examples | None:
    """The split in `folder`; None where there is none that is whole and of the files as they are."""
    try:
        examples = Examples(folder)
    except ValueError:
        return None
    return examples if examples.is_current else None


def _find(request: TaskRequest, split: str, root: Path, to_train: bool) -> dict[str, tuple[float, Examples]] | None:
    """Rate and whole split of every task that has it; None where something is missing."""
    try:
        tasks = json.loads(names_path(request, root).read_text())
        held = {name: Held(float(one["rate"]), tuple(one["splits"])) for name, one in tasks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    found = {}
    for task, one in with_split(request, held, split, to_train).items():
        examples = open_current(split_folder(request, task, split, root))
        if examples is None:
            return None
        found[task] = (one.rate, examples)
    return found

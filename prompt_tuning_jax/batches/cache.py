"""Tokenised splits on disk, and how to read them: NumPy alone.

A split that is not there yet is built by `batches.build` in a process of its own, so that TensorFlow's memory and
start-up are paid once and never by a training host.

    <cache>/<task>-<fingerprint>/<split>/
        task.json       what scores the task: postprocessor and metrics by name, and the count of examples
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
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

import prompt_tuning_jax
from prompt_tuning_jax.tasks.vocabularies import Vocabulary

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """What decides a task's tokens.

    Attributes:
      name: of a SeqIO task.
      vocabulary: path of the SentencePiece model.
      feature_lengths: TASK_FEATURE_LENGTHS, "inputs" and "targets", end of sequence included.
      data_dir: the benchmark's own files; None for TFDS.
      modules: imported to register tasks, beside this project's own.
    """

    name: str
    vocabulary: str
    feature_lengths: Mapping[str, int]
    data_dir: str | None = None
    modules: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Changes with the task, the vocabulary, the lengths, the files read and the code that reads them."""
        code = hashlib.sha256()
        for path in sorted(Path(prompt_tuning_jax.__file__).parent.glob("tasks/*.py")):
            code.update(path.read_bytes())
        parts = [
            FORMAT,
            self.name,
            Vocabulary(self.vocabulary).fingerprint,
            sorted(self.feature_lengths.items()),
            files_fingerprint(self.data_dir),
            [(name, _source_fingerprint(name)) for name in self.modules],
            code.hexdigest(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source_fingerprint(module: str) -> str | None:
    """Of the file that Python would import, which stays unimported here; None where there is none."""
    stem = module.replace(".", "/")
    found = (Path(p or ".", f"{stem}{end}") for p in sys.path for end in ("/__init__.py", ".py"))
    source = next((path for path in found if path.is_file()), None)
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None


def files_fingerprint(folder: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files under `folder`."""
    if folder is None:
        return []
    if not os.path.isdir(folder):
        raise ValueError(f"no folder {folder}: set DATA_DIR to the folder that holds the task's files")
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


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

    def __init__(self, folder: Path, rows: slice):
        self._folder = folder
        try:
            self._task = json.loads((folder / "task.json").read_text())
            self.inputs, self.targets = Ragged(folder, "inputs"), Ragged(folder, "targets")
            whole = len(self.inputs) == len(self.targets) == self._task["examples"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the cache {folder} cannot be read ({error}): delete the folder") from None
        if not whole:
            raise ValueError(f"the cache {folder} is not whole: delete the folder")
        self.rows = np.arange(len(self.inputs))[rows]
        self._slice = rows

    def __len__(self) -> int:
        return len(self.rows)

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


def load_split(request: TaskRequest, split: str, cache_dir: str | os.PathLike | None = None) -> Examples:
    """The examples of `split`, tokenised first where the cache has not got them.

    Args:
      split: a split's name, or a slice of one as in TFDS: "train[:-2000]".
      cache_dir: `default_cache_dir()` where None.

    Raises:
      ValueError: the task, split or data is not there or not sound; the message says what to set.
    """
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if not match:
        raise ValueError(
            f"split {split!r}, expected a name or a slice such as train[:-2000]: set TRAIN_SPLIT or EVAL_SPLIT"
        )
    name, start, stop = match[1], match[2], match[3]
    root = Path(cache_dir or default_cache_dir())
    folder = root / f"{request.name}-{request.fingerprint()}" / name
    if not (folder / "task.json").exists():
        _build(request, name, folder)
    examples = Examples(folder, slice(int(start) if start else None, int(stop) if stop else None))
    if not len(examples):
        raise ValueError(
            f"split {split!r} of {request.name} is empty: set TRAIN_SPLIT and EVAL_SPLIT to splits with rows"
        )
    return examples


def default_cache_dir() -> Path:
    """`$PROMPT_TUNING_CACHE`, or a folder of this project's in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PROMPT_TUNING_CACHE") or Path(home, "prompt_tuning_jax")) / "tasks"


def _build(request: TaskRequest, split: str, folder: Path) -> None:
    """Runs `batches.build`; its one line of error becomes ours."""
    order = json.dumps(dataclasses.asdict(request) | {"split": split, "folder": str(folder)})
    print(f"tokenising {request.name}, {split} (once; kept in {folder})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "prompt_tuning_jax.batches.build", order]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"tokenising {request.name} failed:\n{done.stderr.strip()}")

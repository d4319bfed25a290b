"""Reads tokenised splits from the cache on disk, with NumPy only.

A split that is missing, or whose source files have changed, is built by `batches.build` in a child process. So
TensorFlow is started once per split, and its memory is never taken in the training process.

    <cache>/names/<name>-<fingerprint>.json     the tasks of a name, with their rates and splits
    <cache>/<task>-<fingerprint>/<split>/
        task.json       the names of the postprocessor and the metrics; the number of examples; the source files that
                        were read, as `PathState`; the sizes and hashes of the files below
        inputs.npy      int32, the tokens of all examples, concatenated; inputs_ends.npy, int64, the end of each example
        targets.npy, targets_ends.npy
        fields.jsonl    the other fields of each example, in order; absent if the task has none

Both JSON files end with a hash of their own contents, see `with_hash`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

import prompt_tuning_jax
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.batches.examples import Examples, Ragged, hash_of
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """Holds everything that determines a task's tokens.

    Attributes:
      name: the name of a SeqIO task or mixture.
      vocabulary: the path of the SentencePiece model or tokenizer.json, or 'bytes'.
      feature_lengths: TASK_FEATURE_LENGTHS, "inputs" and "targets", including the end of sequence.
      data_dir: the folder of the benchmark's own files; None for TFDS.
      modules: modules to import because they register tasks, in addition to this project's own.
      eos_id: the id of the model's end of sequence; None for the tokenizer's.
    """

    name: str
    vocabulary: str
    feature_lengths: Mapping[str, int]
    data_dir: str | None = None
    modules: tuple[str, ...] = ()
    eos_id: int | None = None

    def to_child_request(self, **more: Any) -> dict[str, Any]:
        """Returns the request as a dictionary for JSON, with the other arguments of a child process."""
        return {"request": dataclasses.asdict(self), **more}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "TaskRequest":
        return cls(**{**fields, "modules": tuple(fields["modules"])})

    def fingerprint(self) -> str:
        """Returns a hash of the task, the vocabulary, the lengths, the path of the files and the code that reads them.

        The files' contents are not in it: `CachedExamples.is_current` checks them when a split is opened.
        """
        data_dir = self.data_dir and os.path.realpath(self.data_dir)
        lengths = sorted(self.feature_lengths.items())
        return hash_of(
            self._definition(), Vocabulary(self.vocabulary, eos_id=self.eos_id).fingerprint, lengths, data_dir
        )

    def names_fingerprint(self) -> str:
        """Returns a hash of all that may change which tasks a name has."""
        return hash_of(self._definition())

    def _definition(self) -> list:
        code = hashlib.sha256()
        for path in sorted(Path(prompt_tuning_jax.__file__).parent.glob("tasks/*.py")):
            if path.name != "__main__.py":
                code.update(path.read_bytes())
        modules = [(name, _source_fingerprint(name)) for name in self.modules]
        return [FORMAT, self.name, modules, code.hexdigest()]


def _source_fingerprint(module: str) -> str | None:
    """Returns a hash of the file that Python would import for a module, without importing it; None if there is none."""
    stem = module.replace(".", "/")
    found = (Path(p or ".", f"{stem}{end}") for p in sys.path for end in ("/__init__.py", ".py"))
    source = next((path for path in found if path.is_file()), None)
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None


class PathState(NamedTuple):
    """Holds the state of a file or folder when it was read. A link is followed.

    Attributes:
      state: [size (0 for a folder), mtime in ns, ctime in ns]; None if there was no such path.
      content: a hash of the file's bytes, or of the names in the folder; None if it cannot be read.
    """

    state: list[int] | None
    content: str | None

    def is_unchanged(self, path: str | os.PathLike) -> bool:
        """Returns whether the path is unchanged. It is read only if its times have changed and its size has not."""
        now = file_state(path)
        if now is None or self.state is None or now == self.state:
            return now == self.state
        return now[0] == self.state[0] and self.content is not None and content_hash(path) == self.content


def file_state(path: str | os.PathLike) -> list[int] | None:
    """Returns `PathState.state` of a file or a folder."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [0 if stat.S_ISDIR(found.st_mode) else found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def content_hash(path: str | os.PathLike) -> str | None:
    """Returns `PathState.content` of a file or a folder."""
    try:
        if os.path.isdir(path):
            return hash_of(sorted(os.listdir(path)))
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def with_hash(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object that JSON can hold with a hash of its fields, for `checked_fields`."""
    fields = json.loads(json.dumps(fields))
    return {**fields, "hash": hash_of(fields)}


def checked_fields(text: str | bytes) -> dict[str, Any]:
    """Returns the fields of a JSON object that `with_hash` gave.

    Raises:
      ValueError: it is no longer what it was.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.pop("hash", None) != hash_of(found):
        raise ValueError("its content does not match its hash, so it was changed or damaged")
    return found


class CachedExamples(Examples):
    """A split in the cache, with memory-mapped tokens."""

    def __init__(self, folder: Path, rows: slice = slice(None)):
        """Opens the files in `folder`, whose hashes `open_or_why` compares.

        Raises:
          ValueError: a file is missing, truncated or unreadable.
        """
        self._folder = folder
        try:
            self._task = json.loads((folder / "task.json").read_bytes())
            super().__init__(_ragged(folder, "inputs"), _ragged(folder, "targets"), self._task, rows)
            complete = len(self.inputs) == len(self.targets) == self._task["examples"]
            complete &= all(
                (folder / name).stat().st_size == size for name, size in self._task.get("sizes", {}).items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the cache {folder} cannot be read ({error}): delete the folder") from None
        if not complete:
            raise ValueError(f"the cache {folder} is not whole: delete the folder")

    def __getitem__(self, rows: slice) -> "CachedExamples":
        return CachedExamples(self._folder, rows)

    @property
    def is_current(self) -> bool:
        """Returns whether the source files and the folders that were searched for them are unchanged."""
        return all(PathState(*seen).is_unchanged(path) for path, seen in self._task["read"].items())

    def damaged(self) -> str | None:
        """Reads every file, and returns the name of the first whose hash differs from the recorded one, or None."""
        try:
            checked_fields((self._folder / "task.json").read_bytes())
        except ValueError:
            return "task.json"
        hashes = self._task["hashes"].items()
        return next((name for name, written in hashes if content_hash(self._folder / name) != written), None)

    @functools.cached_property
    def fields(self) -> list[dict[str, Any]]:
        lines = self._field_lines()
        return [{} for _ in self.rows] if lines is None else [json.loads(line) for line in lines]

    def target_texts(self, rows: Int[np.ndarray, " n"]) -> list[str | None]:
        wanted = set(rows.tolist())
        try:
            with open(self._folder / "fields.jsonl", "rb") as lines:
                fields = [json.loads(line) for number, line in enumerate(lines) if number in wanted]
        except FileNotFoundError:
            return [None] * len(rows)
        found = (row.get("targets_pretokenized") for row in fields)
        return [text if isinstance(text, str) else None for text in found]

    def _field_lines(self) -> list[bytes] | None:
        """Returns the lines of this slice's rows, or None if the task has no other fields."""
        try:
            with open(self._folder / "fields.jsonl", "rb") as lines:
                return [*lines][self._slice]
        except FileNotFoundError:
            return None

    def _fields_digest(self) -> str:
        # All fields are hashed, because a task's own postprocessor may read any of them.
        return hashlib.sha256(b"".join(self._field_lines() or [])).hexdigest()


def _ragged(folder: Path, name: str) -> Ragged:
    return Ragged(np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}_ends.npy"))


class Part(NamedTuple):
    """Holds one task of a mixture, or a task that stands alone.

    Attributes:
      rate: how often training draws from the task, in any unit; 0 if the task is only evaluated.
      examples: the task's tokenised rows.
    """

    rate: float
    examples: Examples


def to_stderr(line: str) -> None:
    """Prints a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def load_tasks(
    request: TaskRequest,
    split: str,
    cache_dir: str | os.PathLike | None = None,
    *,
    to_train: bool = False,
    then: Sequence[str] = (),
    say: Callable[[str], None] | None = to_stderr,
) -> dict[str, Part]:
    """Returns the examples of `split` for every task that has it, by task. Tokenises those that the cache lacks.

    Args:
      request: the task or mixture, and what determines its tokens.
      split: a split's name, or a slice of one as in TFDS: "train[:-2000]".
      cache_dir: the cache's folder; None for `default_cache_dir()`.
      to_train: whether to leave out tasks with rate 0.
      then: names of further splits that will be read. If `split` must be tokenised, the same process tokenises these,
        too, because a process needs seconds to import TensorFlow.
      say: is called with each line that reports what is tokenised; None to report nothing.

    Raises:
      ValueError: a task, a split or data is missing or invalid; the message says what to set.
    """
    name, rows = split_rows(split)
    root = Path(cache_dir or default_cache_dir())
    if request.data_dir is not None and not os.path.isdir(request.data_dir):
        raise SettingError(
            f"no folder {request.data_dir}: set ", Setting("data_dir"), " to the folder that holds the task's files"
        )
    found = _find(request, name, root, to_train)
    if found is None:
        order = request.to_child_request(split=name, cache_dir=str(root), to_train=to_train, then=[*then])
        what = f"tokenising {request.name}, {' and '.join(dict.fromkeys([name, *then]))}"
        child = Child("prompt_tuning_jax.batches.build", order, what, pipe=True)
        for line in child.stdout:
            if say:
                say(line.decode(errors="replace").rstrip("\n"))
        child.finish()
        found = _find(request, name, root, to_train)
        if found is None:
            raise ValueError(f"the files of {request.name} change while they are tokenised: start again when they rest")
    parts = {task: Part(rate, examples[rows]) for task, (rate, examples) in found.items()}
    for task, part in parts.items():
        if not len(part.examples):
            raise empty_split_error(task, split)
    return parts


_EITHER_SPLIT = (Setting("train_split"), " or ", Setting("eval_split"))


def no_split_error(task: str, split: str, there: Iterable[str]) -> SettingError:
    """Returns the error about a split that a task does not have."""
    return SettingError(f"{task} has no split {split!r}, only {', '.join(there)}: set ", *_EITHER_SPLIT)


def empty_split_error(task: str, split: str) -> SettingError:
    """Returns the error about a slice without rows."""
    return SettingError(f"split {split!r} of {task} is empty: set ", *_EITHER_SPLIT, " to a split with rows")


def split_rows(split: str) -> tuple[str, slice]:
    """Parses a split such as "train[:-2000]" into its name and the slice of its rows."""
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if not match:
        raise SettingError(f"split {split!r}, expected a name or a slice such as train[:-2000]: set ", *_EITHER_SPLIT)
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def default_cache_dir() -> Path:
    """Returns the folder "tasks" in `$PROMPT_TUNING_CACHE`, or in `user_cache()` if that is not set."""
    return Path(os.environ.get("PROMPT_TUNING_CACHE") or user_cache()) / "tasks"


def user_cache() -> Path:
    """Returns this project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "prompt_tuning_jax")


class TaskSplits(NamedTuple):
    """Holds the rate and the splits of one task of a name, so that SeqIO is not needed to look them up."""

    rate: float
    splits: tuple[str, ...]


def names_path(request: TaskRequest, root: Path) -> Path:
    """Returns the path of the cache's file that lists the tasks of the request's name."""
    return root / "names" / f"{request.name}-{request.names_fingerprint()}.json"


def split_folder(request: TaskRequest, task: str, split: str, root: Path) -> Path:
    """Returns the cache's folder for a split of one of the request's tasks."""
    return root / f"{task}-{dataclasses.replace(request, name=task).fingerprint()}" / split


def with_split(
    request: TaskRequest, tasks: Mapping[str, TaskSplits], split: str, to_train: bool
) -> dict[str, TaskSplits]:
    """Returns the tasks that have `split`; for training, only those with a rate above 0.

    Raises:
      ValueError: there is no such task.
    """
    having = {task: one for task, one in tasks.items() if split in one.splits}
    if not having:
        raise no_split_error(request.name, split, dict.fromkeys(name for one in tasks.values() for name in one.splits))
    if to_train:
        having = {task: one for task, one in having.items() if one.rate > 0}
        if not having:
            raise SettingError(
                f"every task of {request.name} that has the split {split!r} has mixing rate 0: set ",
                Setting("mixture_or_task_name"),
                " to another mixture",
            )
    return having


def open_current(folder: Path) -> CachedExamples | None:
    """Returns the split in `folder`, or None if it is missing, damaged, or older than its source files."""
    found = open_or_why(folder)
    return found if isinstance(found, CachedExamples) else None


def open_or_why(folder: Path) -> CachedExamples | str:
    """Returns the split in `folder`, or the reason why it must be built, such as "its inputs.npy is damaged (...)"."""
    if not folder.exists():
        return "it is absent"
    try:
        examples = CachedExamples(folder)
    except ValueError:
        return "it is damaged"
    if (damaged := examples.damaged()) is not None:
        return f"its {damaged} is damaged"
    return examples if examples.is_current else "the files that it was made of have changed"


def _find(request: TaskRequest, split: str, root: Path, to_train: bool) -> dict[str, tuple[float, Examples]] | None:
    """Returns the rate and the whole split of every task that has it, or None if any of them is not in the cache."""
    try:
        tasks = checked_fields(names_path(request, root).read_bytes())["tasks"]
        splits_of = {name: TaskSplits(float(one["rate"]), tuple(one["splits"])) for name, one in tasks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    found = {}
    for task, one in with_split(request, splits_of, split, to_train).items():
        examples = open_current(split_folder(request, task, split, root))
        if examples is None:
            return None
        found[task] = (one.rate, examples)
    return found

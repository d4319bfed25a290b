"""Tokenised splits on disk, and how to read them: NumPy alone.

A split that is not there yet, or no longer what its files hold, is built by `batches.build` in a process of its own, so
that TensorFlow's memory and start-up are paid once and never by a training host.

    <cache>/names/<name>-<fingerprint>.json     what a name holds: its tasks, their rates and splits
    <cache>/<task>-<fingerprint>/<split>/
        task.json       what scores the task: postprocessor and metrics by name; the count of examples; the files that
                        were read, see `Seen`; the sizes and hashes of the files below
        inputs.npy      int32, all examples one after another; inputs_ends.npy, int64, where each one ends
        targets.npy, targets_ends.npy
        fields.jsonl    what else the task keeps of each example, in order; absent where it keeps nothing

Both JSON files end with a hash of themselves, see `sealed`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

import prompt_tuning_jax
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.batches.examples import Examples, Ragged, combined
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

FORMAT = 3


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """What decides a task's tokens.

    Attributes:
      name: of a SeqIO task or mixture.
      vocabulary: path of the SentencePiece model or tokenizer.json, or 'bytes'.
      feature_lengths: TASK_FEATURE_LENGTHS, "inputs" and "targets", end of sequence included.
      data_dir: the benchmark's own files; None for TFDS.
      modules: imported to register tasks, beside this project's own.
      eos_id: the model's end of sequence; None for the tokenizer's own.
    """

    name: str
    vocabulary: str
    feature_lengths: Mapping[str, int]
    data_dir: str | None = None
    modules: tuple[str, ...] = ()
    eos_id: int | None = None

    def order(self, **more: Any) -> dict[str, Any]:
        """As JSON can hold it, with what else a child must know."""
        return {"request": dataclasses.asdict(self), **more}

    @classmethod
    def from_order(cls, fields: Mapping[str, Any]) -> "TaskRequest":
        return cls(**{**fields, "modules": tuple(fields["modules"])})

    def fingerprint(self) -> str:
        """Changes with the task, the vocabulary, the lengths, the place of the files and the code that reads them.

        What lies in the files is compared where a split is read: `CachedExamples.is_current`.
        """
        place = self.data_dir and os.path.realpath(self.data_dir)
        lengths = sorted(self.feature_lengths.items())
        return combined(self._definition(), Vocabulary(self.vocabulary, eos_id=self.eos_id).fingerprint, lengths, place)

    def names_fingerprint(self) -> str:
        """Changes with what may change the tasks of a name."""
        return combined(self._definition())

    def _definition(self) -> list:
        code = hashlib.sha256()
        for path in sorted(Path(prompt_tuning_jax.__file__).parent.glob("tasks/*.py")):
            if path.name != "__main__.py":
                code.update(path.read_bytes())
        modules = [(name, _source_fingerprint(name)) for name in self.modules]
        return [FORMAT, self.name, modules, code.hexdigest()]


def _source_fingerprint(module: str) -> str | None:
    """Of the file that Python would import, which stays unimported here; None where there is none."""
    stem = module.replace(".", "/")
    found = (Path(p or ".", f"{stem}{end}") for p in sys.path for end in ("/__init__.py", ".py"))
    source = next((path for path in found if path.is_file()), None)
    return hashlib.sha256(source.read_bytes()).hexdigest() if source else None


class Seen(NamedTuple):
    """A file or a folder as it was when it was read. A link is what it leads to.

    Attributes:
      state: size, 0 for a folder, and both times of change; None if nothing was there.
      content: a hash of the file, or of the names in the folder; None if it cannot be read.
    """

    state: list[int] | None
    content: str | None

    def is_still(self, path: str | os.PathLike) -> bool:
        """Whether the file is as it was. It is read only if its times have changed, but not its size."""
        now = file_state(path)
        if now is None or self.state is None or now == self.state:
            return now == self.state
        return now[0] == self.state[0] and self.content is not None and content_hash(path) == self.content


def file_state(path: str | os.PathLike) -> list[int] | None:
    """Returns `Seen.state` of a file or a folder."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [0 if stat.S_ISDIR(found.st_mode) else found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def content_hash(path: str | os.PathLike) -> str | None:
    """Returns `Seen.content` of a file or a folder."""
    try:
        if os.path.isdir(path):
            return combined(sorted(os.listdir(path)))
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object that JSON can hold with a hash of its fields, for `unsealed`."""
    fields = json.loads(json.dumps(fields))
    return {**fields, "hash": combined(fields)}


def unsealed(text: str | bytes) -> dict[str, Any]:
    """Returns the fields of a JSON object that `sealed` gave.

    Raises:
      ValueError: it is no longer what it was.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.pop("hash", None) != combined(found):
        raise ValueError("it is not as it was written")
    return found


class CachedExamples(Examples):
    """Examples in the files of a cache, whose tokens are memory-mapped."""

    def __init__(self, folder: Path, rows: slice = slice(None)):
        """Opens the files in `folder`, whose hashes `open_or_why` compares.

        Raises:
          ValueError: they are not whole.
        """
        self._folder = folder
        try:
            self._task = json.loads((folder / "task.json").read_bytes())
            super().__init__(_ragged(folder, "inputs"), _ragged(folder, "targets"), self._task, rows)
            whole = len(self.inputs) == len(self.targets) == self._task["examples"]
            whole &= all((folder / name).stat().st_size == size for name, size in self._task.get("sizes", {}).items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"the cache {folder} cannot be read ({error}): delete the folder") from None
        if not whole:
            raise ValueError(f"the cache {folder} is not whole: delete the folder")

    def __getitem__(self, rows: slice) -> "CachedExamples":
        return CachedExamples(self._folder, rows)

    @property
    def is_current(self) -> bool:
        """Whether the files that were read, and the folders that were searched for them, are as they were."""
        return all(Seen(*seen).is_still(path) for path, seen in self._task["read"].items())

    def damaged(self) -> str | None:
        """Returns the first of its files that is not as it was written; None if there is none. All of them are read."""
        try:
            unsealed((self._folder / "task.json").read_bytes())
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
        """The lines of this slice's rows; None where the task keeps no fields."""
        try:
            with open(self._folder / "fields.jsonl", "rb") as lines:
                return [*lines][self._slice]
        except FileNotFoundError:
            return None

    def _fields_digest(self) -> str:
        # All of them: a task's own postprocessor may read any.
        return hashlib.sha256(b"".join(self._field_lines() or [])).hexdigest()


def _ragged(folder: Path, name: str) -> Ragged:
    return Ragged(np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}_ends.npy"))


class Part(NamedTuple):
    """One task of a mixture, or the one that a task is.

    Attributes:
      rate: how often training draws from it, in any unit; 0 where it is for evaluation only.
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
    say: Callable[[str], None] | None = to_stderr,
) -> dict[str, Part]:
    """The examples of `split` of every task that has it, tokenised first where the cache has not got them.

    Args:
      split: a split's name, or a slice of one as in TFDS: "train[:-2000]".
      cache_dir: `default_cache_dir()` where None.
      to_train: leave out tasks of rate 0.
      say: is told, in a line, of what is tokenised; None for nobody.

    Raises:
      ValueError: a task, split or data is not there or not sound; the message says what to set.
    """
    name, rows = split_rows(split)
    root = Path(cache_dir or default_cache_dir())
    if request.data_dir is not None and not os.path.isdir(request.data_dir):
        raise SettingError(
            f"no folder {request.data_dir}: set ", Setting("data_dir"), " to the folder that holds the task's files"
        )
    found = _find(request, name, root, to_train)
    if found is None:
        order = request.order(split=name, cache_dir=str(root), to_train=to_train)
        child = Child("prompt_tuning_jax.batches.build", order, f"tokenising {request.name}, {name}", pipe=True)
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
            raise empty_split(task, split)
    return parts


_EITHER_SPLIT = (Setting("train_split"), " or ", Setting("eval_split"))


def no_split(task: str, split: str, there: Iterable[str]) -> SettingError:
    """Returns the error about a split that a task does not have."""
    return SettingError(f"{task} has no split {split!r}, only {', '.join(there)}: set ", *_EITHER_SPLIT)


def empty_split(task: str, split: str) -> SettingError:
    """Returns the error about a slice without rows."""
    return SettingError(f"split {split!r} of {task} is empty: set ", *_EITHER_SPLIT, " to a split with rows")


def split_rows(split: str) -> tuple[str, slice]:
    """A split's name, and which of its rows."""
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if not match:
        raise SettingError(f"split {split!r}, expected a name or a slice such as train[:-2000]: set ", *_EITHER_SPLIT)
    name, start, stop = match.groups()
    return name, slice(int(start) if start else None, int(stop) if stop else None)


def default_cache_dir() -> Path:
    """`$PROMPT_TUNING_CACHE`, or a folder of this project's in the user's cache."""
    return Path(os.environ.get("PROMPT_TUNING_CACHE") or user_cache()) / "tasks"


def user_cache() -> Path:
    """Returns this project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "prompt_tuning_jax")


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
        raise no_split(request.name, split, dict.fromkeys(name for one in held.values() for name in one.splits))
    if to_train:
        having = {task: one for task, one in having.items() if one.rate > 0}
        if not having:
            raise SettingError(
                f"{request.name} gives no task with {split!r} a rate above 0: set ", Setting("mixture_or_task_name")
            )
    return having


def open_current(folder: Path) -> CachedExamples | None:
    """The split in `folder`; None where there is none that is whole and of the files as they are."""
    found = open_or_why(folder)
    return found if isinstance(found, CachedExamples) else None


def open_or_why(folder: Path) -> CachedExamples | str:
    """Returns the split in `folder`, or in a few words why it must be made, and made again if it is there."""
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
    """Rate and whole split of every task that has it; None where something is missing."""
    try:
        tasks = unsealed(names_path(request, root).read_bytes())["tasks"]
        held = {name: Held(float(one["rate"]), tuple(one["splits"])) for name, one in tasks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    found = {}
    for task, one in with_split(request, held, split, to_train).items():
        examples = open_current(split_folder(request, task, split, root))
        if examples is None:
            return None
        found[task] = (one.rate, examples)
    return found

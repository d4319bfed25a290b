"""What a Python caller may train and evaluate on: a SeqIO task, files, or rows in memory.

    >>> data = files({"train": "train.jsonl"}, labels=["negative", "positive"])
    >>> data["train[:-500]"].split
    'train[:-500]'

Nothing is read before batches are asked for, except rows in memory, which are checked at once.
"""

import dataclasses
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.batches.cache import no_split, split_rows
from prompt_tuning_jax.batches.dataset import DatasetConfig, Say
from prompt_tuning_jax.errors import Setting, SettingError, prefixed
from prompt_tuning_jax.settings import Text, Texts, as_path
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tasks.rows import Rows, RowSource, check_answers
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

INPUT_LENGTH, MOST_TARGETS = 512, 512  # tokens, end of sequence included
SPLITS = frozenset(("train", "validation", "test"))  # no names of tasks: a mapping with one of these is of splits


@dataclasses.dataclass(frozen=True)
class Data:
    """Data by name, which `task` and `files` make. `data["train[:-500]"]` is the same data with that split chosen.

    Attributes:
      name: the SeqIO task or mixture; or what the rows of `source` are called in a run's records.
      split: a split's name or a slice of one; None if none is chosen.
      source: gives rows of text; None for a SeqIO task.
      data_dir, module, cache_dir: of a SeqIO task, as in `DatasetConfig`.
    """

    name: str
    split: str | None = None
    source: RowSource | None = None
    data_dir: str | None = None
    module: str | None = None
    cache_dir: str | None = None

    def __getitem__(self, split: str | Any) -> "Data":
        """Returns the same data with `split` chosen.

        Raises:
          SettingError: it is no split's name or slice, or a source of rows does not have it.
        """
        if not isinstance(split, str):
            raise SettingError(f"split {split!r}, expected a name or a slice as text: data['train[:-500]']")
        name, _ = split_rows(split)
        if self.source is not None and name not in self.source.splits:
            raise no_split(self.name, name, self.source.splits)
        return dataclasses.replace(self, split=split)

    __iter__ = None  # else Python would iterate by `__getitem__`


def task(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    module: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Data:
    """Returns a registered SeqIO task or mixture, which is tokenised once, in a child process, and kept in a cache.

    Args:
      name: of this project's tasks (`python -m prompt_tuning_jax.tasks` lists them), or one that `module` registers.
      data_dir: the folder of the benchmark's own files; None for TFDS.
      module: imported to register the task.
      cache_dir: where tokens are kept; None for the user's cache.
    """
    folders = (None if folder is None else os.fspath(folder) for folder in (data_dir, cache_dir))
    return Data(name, module=module, **dict(zip(("data_dir", "cache_dir"), folders, strict=True)))


def files(
    mapping: Mapping[str, str | os.PathLike] | Any,
    *,
    inputs: Text = "inputs",
    targets: Text = "targets",
    labels: Texts | None = None,
    metrics: Texts | None = None,
    data_dir: str | os.PathLike | Any = None,
) -> Data:
    """Returns the rows of JSONL or TSV files, which are tokenised in this process.

    Args:
      mapping: the file of each split, {"train": "train.jsonl", "validation": "dev.tsv.gz"}: .jsonl, or .tsv with a
        header, also with .gz or .xz behind.
      inputs, targets: the columns. With `labels`, targets are labels or their indices.
      labels: the answers, if they are a closed set.
      metrics: by name: accuracy, f1, mean_f1, matthews (with labels); accuracy, rouge (texts); pearson, spearman
        (numbers). [] for the loss alone; None for accuracy.
      data_dir: the folder that relative paths start from; None for the working directory.

    Raises:
      SettingError: an argument is impossible by itself. The files are read later.
    """
    if isinstance(mapping, Mapping):
        mapping = {split: as_path(path) for split, path in mapping.items()}
    return Data("files", source=TaskFiles(mapping, inputs, targets, labels, metrics, as_path(data_dir)))


def dataset_of(
    data: Any,
    default_split: str,
    *,
    batch_size: int,
    lengths: Mapping[str, int],
    labels: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None,
    metrics: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None,
    setting: str | None = None,
) -> DatasetConfig:
    """Returns what a run reads of `data`.

    Args:
      data: a `Data`; a sequence of rows, mappings with "inputs" and "targets"; or several of these by their tasks'
        names, `{"sst2": rows, "mrpc": rows}`, from which training draws in proportion to their rows.
      default_split: the split of a `Data` that has none chosen.
      lengths: the most tokens of "inputs" and "targets", end of sequence included.
      labels: the answers, if they are a closed set: only for rows, and for files without labels of their own. Of
        several tasks, those of all tasks, or those of each by its name.
      metrics: the same, by name.
      setting: the canonical name of the argument that `data` is, for errors; None for `default_split`.

    Raises:
      SettingError: it is anything else, or a row is invalid; or labels or metrics are given beside data that has its
        own.
    """
    argument = Setting(setting or default_split)
    if _are_tasks(data):
        tasks = {}
        for name, one in data.items():
            own = {"labels": _of_task(name, "labels", labels), "metrics": _of_task(name, "metrics", metrics)}
            try:
                tasks[name] = dataset_of(
                    one, default_split, batch_size=batch_size, lengths=lengths, **own, setting=setting
                )
            except ValueError as error:
                raise prefixed(f"task {name}: ", error) from None
        return DatasetConfig("rows", default_split, batch_size, lengths, tasks=tasks)
    for name, given in (("labels", labels), ("metrics", metrics)):
        if isinstance(given, Mapping):
            raise SettingError(Setting(name), " is a mapping, expected a list: ", argument, " is no mapping of tasks")
    if not isinstance(data, Data):
        _check_sequence(data, argument)
        check_answers(labels, metrics)
        try:
            rows = Rows(data, labels, metrics, default_split)
        except ValueError as error:
            parts = error.parts if isinstance(error, SettingError) else (str(error),)
            raise SettingError(argument, ", ", *parts) from None
        if not rows.rows(default_split):
            raise SettingError(argument, " has no rows, expected one or more")
        return DatasetConfig("rows", default_split, batch_size, lengths, source=rows)
    source = data.source
    for name, given in (("labels", labels), ("metrics", metrics)):
        if given is None:
            continue
        if source is None:
            raise SettingError(Setting(name), f" is given, but the task {data.name} has its own: leave it out")
        if getattr(source, name) is not None:
            raise SettingError(Setting(name), f" is given twice, also with the {data.name}: leave out one")
    if labels is not None or metrics is not None:
        given = {"labels": labels, "metrics": metrics}
        source = dataclasses.replace(source, **{name: value for name, value in given.items() if value is not None})
    return DatasetConfig(
        data.name,
        data.split or data[default_split].split,
        batch_size,
        lengths,
        module=data.module,
        data_dir=data.data_dir,
        cache_dir=data.cache_dir,
        source=source,
    )


def _are_tasks(data: Any) -> bool:
    """Returns whether `data` is several tasks by name, and not columns or splits by theirs."""
    return (
        isinstance(data, Mapping)
        and len(data) > 0
        and all(isinstance(name, str) for name in data)
        and not {"inputs", "targets"} <= {*data}
        and not SPLITS & {*data}
    )


def _of_task(name: str, setting: str, given: Any) -> Any:
    """Returns a task's own labels or metrics, of those that were given for all tasks or by task."""
    if not isinstance(given, Mapping):
        return given
    if name not in given:
        raise SettingError(Setting(setting), f" has nothing for the task {name}: set it to None there if it has none")
    return given[name]


def default_lengths(
    train: Any,
    validation: Any,
    vocabulary: Vocabulary,
    labels: Sequence[str] | Mapping[str, Sequence[str] | None] | None = None,
    *,
    say: Say | None = None,
) -> dict[str, int]:
    """Returns the lengths of a run that names none: 512 tokens of inputs, and room for the longest target.

    "targets" is the most tokens of a target, or of a label, end of sequence included; at most 512. A SeqIO task is
    tokenised for this, and again if the lengths turn out to be others: name them where that takes long.

    Args:
      train, validation: as `dataset_of` takes them.
      say: as in `DatasetConfig.batches`.

    Raises:
      ValueError: as `dataset_of` and `DatasetConfig.batches`.
    """
    most = {"inputs": INPUT_LENGTH, "targets": MOST_TARGETS}
    longest = 2  # a token and the end of sequence
    for data, split in ((train, "train"), (validation, "validation")):
        own_labels = None if isinstance(data, Data) and (data.source is None or data.source.labels) else labels
        config = dataset_of(data, split, batch_size=1, lengths=most, labels=own_labels)
        for one in [config] if config.tasks is None else config.tasks.values():
            longest = max(longest, _longest_target(one, vocabulary, split == "train", say))
    return {"inputs": INPUT_LENGTH, "targets": min(longest, MOST_TARGETS)}


def _longest_target(config: DatasetConfig, vocabulary: Vocabulary, to_train: bool, say: Say | None) -> int:
    """Returns the most tokens of a target, or of a label, end of sequence included."""
    longest, texts = 1, set()
    if config.source is None:
        for part in config.load(vocabulary, to_train=to_train, say=say).values():
            examples = part.examples
            texts |= {*(answers(examples.postprocess) or ())}
            longest = max(longest, int(examples.targets.lengths[examples.rows].max()))
    else:
        name, rows = split_rows(config.split)
        texts = {row["targets"] for row in config.source.rows(name)[rows]} | {*(config.source.labels or ())}
    return max([longest, *(len(ids) + 1 for ids in vocabulary.encode_all(sorted(texts)))])


def _check_sequence(data: Any, argument: Setting) -> None:
    """Raises `SettingError` if `data` cannot be a sequence of rows, and says what to give instead."""
    rows = "a sequence of rows {'inputs': ..., 'targets': ...}, or pt.task(...) or pt.files(...)"
    if isinstance(data, str | bytes | os.PathLike):
        kind, text = ("a path" if isinstance(data, os.PathLike) else "a text"), os.fspath(data)
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        raise SettingError(
            argument, f" is {kind}, {text!r}: for a file write pt.files({{'{argument}': {text!r}}}), for a SeqIO task "
            f"pt.task({text!r}); expected {rows}",
        )  # fmt: skip
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        records = "to_dicts()" if hasattr(data, "to_dicts") else "to_dict('records')"
        raise SettingError(argument, f" is a {type(data).__name__}: give its rows, frame.{records}")
    if isinstance(data, Mapping):
        if {"inputs", "targets"} <= {*data}:
            hint = "if they are columns, give their rows: [dict(zip(data, row)) for row in zip(*data.values())]"
        else:
            hint = "choose one of its values, or write pt.files({...}) for files"
        raise SettingError(
            argument, f" is a mapping with the keys {', '.join(map(repr, data))}: {hint}; expected {rows}"
        )  # fmt: skip
    if isinstance(data, Iterator):
        raise SettingError(argument, f" is a {type(data).__name__}, which can be read only once: give list(...) of it")
    if not isinstance(data, Iterable):
        raise SettingError(argument, f" is {reprlib.repr(data)}, expected {rows}")

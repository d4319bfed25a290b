"""Describes the data that a Python caller trains and evaluates on: a SeqIO task, files, or rows in memory.

    >>> data = files({"train": "train.jsonl"}, labels=["negative", "positive"])
    >>> data["train[:-500]"].split
    'train[:-500]'

Tasks and files are read only when batches are asked for; rows in memory are checked at once.
"""

import dataclasses
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.batches.cache import no_split_error, split_rows
from prompt_tuning_jax.batches.dataset import DatasetConfig, Say
from prompt_tuning_jax.errors import Setting, SettingError, prefixed
from prompt_tuning_jax.settings import Text, Texts, as_path
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tasks.rows import Rows, RowSource, check_answers
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

INPUT_LENGTH, MOST_TARGETS = 512, 512  # in tokens, including the end of sequence
SPLITS = frozenset(("train", "validation", "test"))  # a mapping with one of these keys has splits, not tasks


@dataclasses.dataclass(frozen=True)
class Data:
    """Describes a data set, as made by `task` and `files`. `data["train[:-500]"]` chooses a split of it.

    Attributes:
      name: the SeqIO task or mixture; for a `source`, the name of its rows in a run's records.
      split: a split's name or a slice of one; None if no split is chosen.
      source: returns rows of text; None for a SeqIO task.
      data_dir, module, cache_dir: settings of a SeqIO task, as in `DatasetConfig`.
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
          SettingError: `split` is not a split's name or slice, or `source` does not have it.
        """
        if not isinstance(split, str):
            raise SettingError(f"split {split!r}, expected a name or a slice as text: data['train[:-500]']")
        name, _ = split_rows(split)
        if self.source is not None and name not in self.source.splits:
            raise no_split_error(self.name, name, self.source.splits)
        return dataclasses.replace(self, split=split)

    __iter__ = None  # otherwise Python would iterate with `__getitem__`


def task(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    module: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Data:
    """Returns a registered SeqIO task or mixture, which is tokenised once, in a child process, and cached.

    Args:
      name: one of this project's tasks (`python -m prompt_tuning_jax.tasks` lists them), or one that `module`
        registers.
      data_dir: the folder of the benchmark's own files; None for TFDS.
      module: a module to import because it registers the task.
      cache_dir: the folder of the token cache; None for the user's cache.
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
      mapping: the file of each split, {"train": "train.jsonl", "validation": "dev.tsv.gz"}. Files are .jsonl, or .tsv
        with a header, and may be compressed (.gz or .xz).
      inputs, targets: the names of the columns. With `labels`, targets are labels or their indices.
      labels: the possible answers, if they are a closed set.
      metrics: names of metrics: accuracy, f1, mean_f1, matthews (with labels); accuracy, rouge (texts); pearson,
        spearman (numbers). [] for only the loss; None for accuracy.
      data_dir: the folder that relative paths start from; None for the working directory.

    Raises:
      SettingError: an argument is invalid. Errors in the files are raised later, when they are read.
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
    """Returns the dataset configuration with which a run reads `data`.

    Args:
      data: a `Data`; a sequence of rows, which are mappings with "inputs" and "targets"; or a mapping of task names to
        these, `{"sst2": rows, "mrpc": rows}`, from which training draws in proportion to the number of rows.
      default_split: the split to read if `data` is a `Data` without a chosen split.
      batch_size: rows per batch.
      lengths: the largest number of tokens of "inputs" and "targets", including the end of sequence.
      labels: the possible answers, if they are a closed set; only for rows, and for files without labels. With several
        tasks, one list for all tasks, or a mapping of task names to lists.
      metrics: names of metrics, in the same forms as `labels`.
      setting: the canonical name of the argument that was passed as `data`, for errors; None for `default_split`.

    Raises:
      SettingError: `data` has another type, or a row is invalid; or labels or metrics are given although the data has
        its own.
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
            raise SettingError(
                Setting(name), " is a mapping by task, but ", argument, " is a single task: give ", Setting(name),
                " as one list",
            )  # fmt: skip
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
    """Returns whether `data` maps names to tasks, and is not a mapping of columns or of splits."""
    return (
        isinstance(data, Mapping)
        and len(data) > 0
        and all(isinstance(name, str) for name in data)
        and not {"inputs", "targets"} <= {*data}
        and not SPLITS & {*data}
    )


def _of_task(name: str, setting: str, given: Any) -> Any:
    """Returns the labels or metrics of one task, from a value for all tasks or a mapping of tasks to values."""
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
    """Returns the lengths of a run that sets none: 512 tokens of inputs, and enough for the longest target.

    "targets" is the number of tokens of the longest target or label, including the end of sequence, but at most 512. A
    SeqIO task is tokenised to find it, and tokenised again if the result differs from the lengths used: set the lengths
    if that takes long.

    Args:
      train, validation: data, as in `dataset_of`.
      vocabulary: the tokenizer.
      labels: the possible answers, as in `dataset_of`.
      say: as in `DatasetConfig.batches`.

    Raises:
      ValueError: for the reasons of `dataset_of` and `DatasetConfig.batches`.
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
    """Returns the number of tokens of the longest target or label, including the end of sequence."""
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

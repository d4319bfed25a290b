"""A user's own rows, without a line of Python: JSONL or TSV files with a column of inputs and a column of targets."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.tasks import metrics, postprocessors

# The functions of `metrics` for answers of each kind.
_OF_LABELS = ("accuracy", "f1", "mean_f1", "matthews")
_OF_TEXTS = ("accuracy", "rouge")
_OF_NUMBERS = ("pearson", "spearman")


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """Where the rows of a task are that no module registers, and how its answers are scored.

    Attributes:
      files: TASK_FILES, of each split, .jsonl or .tsv with a header, also with .gz or .xz behind; under DATA_DIR where
        that is set.
      inputs: INPUTS_COLUMN.
      targets: TARGETS_COLUMN. With `labels` it holds one of them, or its place among them.
      labels: LABELS, where the answers are a closed set; they are then ranked beside being generated.
      metrics: METRICS, by name: accuracy, f1 (of the second of two labels), mean_f1 and matthews of labels; accuracy
        (exact match) and rouge of texts; pearson and spearman of numbers. None where only the loss is evaluated.
    """

    files: Mapping[str, str]
    inputs: str = "inputs"
    targets: str = "targets"
    labels: Sequence[str] | None = None
    metrics: Sequence[str] = ("accuracy",)

    def paths(self, data_dir: str | None) -> dict[str, Path]:
        """The file of each split."""
        return {split: Path(data_dir or "", path) for split, path in self.files.items()}

    def rows(self, path: Path) -> Iterator[dict[str, str]]:
        """The rows of a file as `inputs` and `targets`.

        Raises:
          ValueError: the file is not there, or a row of it not sound; it names the line.
        """
        from prompt_tuning_jax.tasks.sources import read_lines

        if not path.is_file():
            raise ValueError(f"no file {path}: set TASK_FILES, and DATA_DIR where they are under it")
        reader = {".jsonl": _jsonl, ".tsv": _tsv}.get(Path(path.name.removesuffix(".gz").removesuffix(".xz")).suffix)
        if reader is None:
            raise ValueError(f"{path} is neither .jsonl nor .tsv: set TASK_FILES to files of these two formats")
        number = 0
        for number, line in enumerate(read_lines(path), 1):
            try:
                row = reader(line)
                if row is None:  # a header
                    header = line.rstrip("\r\n").split("\t")
                    self._check_columns(header)
                    reader = functools.partial(_tsv, header=header)
                    continue
                self._check_columns(row)
                yield {"inputs": _text(self.inputs, row[self.inputs]), "targets": self._target(row[self.targets])}
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None

    def _check_columns(self, there: Any) -> None:
        for macro, name in (("INPUTS_COLUMN", self.inputs), ("TARGETS_COLUMN", self.targets)):
            if name not in there:
                raise ValueError(f"no column {name!r}, there are {', '.join(map(repr, there))}: set {macro}")

    def _target(self, value: Any) -> str:
        if self.labels is None or value in self.labels:
            return _text(self.targets, value)
        place = str(value)
        if place.isdecimal() and int(place) < len(self.labels) and not isinstance(value, bool):
            return self.labels[int(place)]
        known = ", ".join(map(repr, self.labels))
        raise ValueError(f"{self.targets} {value!r} is none of {known}, nor the place of one: set LABELS")

    def task(self, name: str, vocabulary: Any, data_dir: str | None):
        """A SeqIO task of these files, whose rows are read when it is asked for them (imports TensorFlow).

        Raises:
          ValueError: a metric that is not there, or not for such answers.
        """
        import seqio
        import tensorflow as tf

        paths = self.paths(data_dir)

        def rows(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            found = list(self.rows(paths[split]))
            if not found:
                raise ValueError(f"{paths[split]} has no rows: set TASK_FILES")
            columns = {column: [row[column] for row in found] for column in ("inputs", "targets")}
            dataset = tf.data.Dataset.from_tensor_slices(columns)
            return dataset.shuffle(len(found), seed=seed) if shuffle_files else dataset

        labels = self.labels and tuple(self.labels)
        return seqio.Task(
            name,
            source=seqio.FunctionDataSource(rows, splits=tuple(paths)),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            output_features={name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")},
            postprocess_fn=_postprocessor(self.metrics, labels),
            metric_fns=[_metric(metric, labels) for metric in self.metrics],
        )


def _jsonl(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at character {error.pos + 1}: {error.msg}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{row!r}, expected an object with a field for each column")
    return row


def _tsv(line: str, header: Sequence[str] | None = None) -> dict[str, str] | None:
    """The cells of a line by column, quotes not special; None for the header itself."""
    if header is None:
        return None
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} columns, expected {len(header)}")
    return dict(zip(header, cells, strict=True))


def _text(column: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column} is {value!r}, expected some text")
    return value


def _metric(name: str, labels: tuple[str, ...] | None) -> Any:
    there = _OF_LABELS if labels else (*_OF_TEXTS, *_OF_NUMBERS)
    if name not in there:
        without = "" if labels else "out"
        raise ValueError(f"no metric {name!r} with{without} LABELS, there are {', '.join(there)}: set METRICS")
    function = getattr(metrics, name)
    return functools.partial(function, classes=len(labels)) if name == "mean_f1" and labels else function


def _postprocessor(names: Sequence[str], labels: tuple[str, ...] | None) -> Any:
    if labels:
        return functools.partial(postprocessors.label_index, labels=labels)
    numbers = [name in _OF_NUMBERS for name in names]
    if any(numbers) and not all(numbers):
        raise ValueError(f"{' and '.join(names)} do not go together, some are of numbers: set METRICS")
    return postprocessors.number if any(numbers) else None

"""Reads a user's own JSONL or TSV files, which have a column of inputs and a column of targets."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompt_tuning_jax.errors import Setting, SettingError, prefixed
from prompt_tuning_jax.settings import MappingOf, String, Text, Texts, check
from prompt_tuning_jax.tasks.lines import read_lines
from prompt_tuning_jax.tasks.rows import Row, check_answers, target_of, text_of


@dataclasses.dataclass(frozen=True)
class TaskFiles:
    """A `RowSource` of files, which are read again each time that rows are asked for.

    Attributes:
      files: TASK_FILES, the file of each split: .jsonl, or .tsv with a header. Files may be compressed (.gz or .xz).
      inputs: INPUTS_COLUMN.
      targets: TARGETS_COLUMN. With `labels`, its cells are labels, or their indices if no label is a number.
      labels: LABELS, if the answers are a closed set. Evaluation then ranks the labels, in addition to generating.
      metrics: METRICS, names of metrics. For labels: accuracy, f1 (of the second of two labels), mean_f1, matthews; for
        texts: accuracy (exact match), rouge; for numbers: pearson, spearman. [] if only the loss is evaluated; None for
        accuracy.
      data_dir: DATA_DIR, the folder that relative paths start from; None for the working directory.
    """

    files: Mapping[str, str] | Any  # Any, so that `__post_init__` refuses other types with its own message
    inputs: Text = "inputs"
    targets: Text = "targets"
    labels: Texts | None = None
    metrics: Texts | None = None
    data_dir: Text | None = None

    def __post_init__(self):
        if not isinstance(self.files, Mapping) or not self.files:
            example = "{'train': 'train.jsonl'}"
            raise SettingError(Setting("task_files"), f" is {self.files!r}, expected the file of each split: {example}")
        check("task_files", self.files, MappingOf(String(blank=False)))
        check("inputs_column", self.inputs, Text)
        check("targets_column", self.targets, Text)
        check("data_dir", self.data_dir, Text | None)
        check_answers(self.labels, self.metrics)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def path(self, split: str) -> Path:
        """Returns the file of a split."""
        return Path(self.data_dir or "", self.files[split])

    def rows(self, split: str) -> Sequence[Row]:
        """Returns the rows in the file of `split` as "inputs" and "targets". Empty lines are skipped.

        Raises:
          SettingError: the file does not exist, has no rows, or has an invalid row; the message names the line.
        """
        rows = list(self._read(path := self.path(split)))
        if not rows:
            raise SettingError(f"{path} has no rows: set ", Setting("task_files"))
        return rows

    def remarks(self, split: str, rows: Sequence[Row]) -> Iterator[str]:
        """Yields warnings about valid rows of `split` that may be mistakes, such as quotes in a TSV file."""
        if ".tsv" not in Path(self.files[split]).suffixes:
            return
        for name, column in (("inputs", self.inputs), ("targets", self.targets)):
            quoted = sum(len(row[name]) > 1 and row[name][0] == row[name][-1] == '"' for row in rows)
            if quoted:
                yield (
                    f"{self.path(split)}: {column} stands in quotes in {quoted:,} of {len(rows):,} rows; quotes in a "
                    "TSV file are part of the text: leave them out if they are not meant"
                )

    def _read(self, path: Path) -> Iterator[Row]:
        if not path.is_file():
            data_dir = Setting("data_dir")
            raise SettingError(f"no file {path}: set ", Setting("task_files"), ", and ", data_dir, " if it is under it")
        reader = {".jsonl": _jsonl, ".tsv": _tsv}.get(Path(path.name.removesuffix(".gz").removesuffix(".xz")).suffix)
        if reader is None:
            raise SettingError(
                f"{path} is neither .jsonl nor .tsv: set ", Setting("task_files"), " to files of these two formats"
            )
        for number, line in enumerate(self._lines(path), 1):
            if not line.rstrip("\r\n"):
                continue
            try:
                row = reader(line)
                if row is None:  # a header
                    header = line.rstrip("\r\n").split("\t")
                    self._check_header(header)
                    reader = functools.partial(_tsv, header=header)
                    continue
                self._check_columns(row)
                inputs = text_of(self.inputs, row[self.inputs])
                targets = target_of(row[self.targets], self.labels, self.targets, self.metrics)
                yield {"inputs": inputs, "targets": targets}
            except ValueError as error:
                raise prefixed(f"{path}, line {number}: ", error) from None

    def _lines(self, path: Path) -> Iterator[str]:
        try:
            yield from read_lines(path)
        except ValueError as error:
            raise SettingError(f"{error}: mend the file, or set ", Setting("task_files")) from None

    def _check_header(self, header: Sequence[str]) -> None:
        self._check_columns(header)
        twice = [name for name in (self.inputs, self.targets) if header.count(name) > 1]
        if twice:
            raise ValueError(f"two columns {twice[0]!r}, expected one")

    def _check_columns(self, there: Any) -> None:
        for setting, name in (("inputs_column", self.inputs), ("targets_column", self.targets)):
            if name not in there:
                known = ", ".join(map(repr, there))
                raise SettingError(f"no column {name!r}, there are {known}: set ", Setting(setting))


def _jsonl(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line.strip(), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deep, expected an object with a field for each column") from None
    if not isinstance(row, dict):
        raise ValueError(f"{row!r}, expected an object with a field for each column")
    return row


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict, or raises ValueError if a field is there twice; Python would take the last."""
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two fields {twice!r}, expected one")
    return found


def _tsv(line: str, header: Sequence[str] | None = None) -> dict[str, str] | None:
    """Returns the cells of a line by column, or None if there is no header yet. Quotes are not special."""
    if header is None:
        return None
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} columns, expected {len(header)}")
    return dict(zip(header, cells, strict=True))

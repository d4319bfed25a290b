"""Reads a task's rows from TFDS, or from the benchmark's own files under DATA_DIR.

A task's name is the same for both. `set_data_dir` chooses between them when the rows are read.
"""

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf
from tensorflow_datasets.core.download import downloader

from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tasks import lines

_data_dir: str | None = None
_raised: SettingError | None = None  # an error that a dataset raised; see `remembered`

Row = dict[str, Any]

DATA_DIR = Setting("data_dir")
RETRIES = 4  # retries of a TFDS download, which take about 3 seconds
MEND = ("mend it, or set ", DATA_DIR, " to a sound copy")


def set_data_dir(path: str | None) -> None:
    """Makes every `FilesOrTfds` read its files under `path`, or from TFDS if `path` is None."""
    global _data_dir
    _data_dir = path


def data_dir() -> str | None:
    """Returns the folder of the last call of `set_data_dir`."""
    return _data_dir


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Stores an error for `source_errors`, because TensorFlow keeps only the text of an error raised in a dataset."""
    global _raised
    try:
        yield
    except SettingError as error:
        _raised = error
        raise


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
    """Raises a source's own error instead of TensorFlow's report of it."""
    global _raised
    _raised = None
    try:
        yield
    except tf.errors.OpError as error:
        if _raised is not None:
            raise _raised from None
        # It may be a ValueError of a user's own module, of which TensorFlow has kept only the text.
        raised = re.search(r"ValueError: (.*)", str(error))
        if not raised:
            raise
        raise ValueError(raised[1]) from None


class FilesOrTfds(seqio.DataSource):
    """A TFDS data set, or files with the same rows.

    Attributes:
      tfds_name: the name in TFDS, such as "glue/sst2:2.0.0"; None if TFDS does not have the data set.
      files: the file of each split under DATA_DIR, which may be compressed and then has .gz or .xz after its name. None
        for a split that only TFDS has.
      read: yields the rows of the file at a path.
      read_test: like `read`, for splits whose name begins with "test", which benchmarks publish without labels; None
        for `read`.
      benchmark: the name of the folder that has the files. DATA_DIR is this folder, or the one that contains it.
    """

    def __init__(
        self,
        tfds_name: str | None,
        files: Mapping[str, str | None],
        read: Callable[[Path], Iterable[Row]] | None = None,
        *,
        read_test: Callable[[Path], Iterable[Row]] | None = None,
        benchmark: str | None = None,
        **kwargs: Any,
    ):
        self._name, self._tfds = tfds_name, seqio.TfdsDataSource(tfds_name) if tfds_name else None
        self._files, self._read, self._read_test = dict(files), read, read_test or read
        self._benchmark = benchmark
        super().__init__(splits=tuple(files), **kwargs)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [self._files[split] or split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        file = self._files[split]
        read = self._read_test if split.startswith("test") else self._read
        if _data_dir is None or file is None or read is None:
            return self._from_tfds(split, shuffle, seed, shard_info, num_epochs)
        rows = list(read(find_file(_data_dir, file, self._benchmark)))
        if not rows:
            raise SettingError(f"{file} under ", DATA_DIR, f" {_data_dir} has no rows")
        dataset = tf.data.Dataset.from_tensor_slices(columns_of(rows))
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(len(rows), seed=seed)
        return dataset.repeat(num_epochs)

    def _from_tfds(self, split: str, shuffle: bool, seed: int | None, shard_info, num_epochs: int | None):
        file = self._files[split]
        instead = (
            ("set ", DATA_DIR, f" to the folder with {file}") if file else ("prepare it with TFDS, its only source",)
        )
        if self._tfds is None:
            raise SettingError("these rows are not in TFDS: ", *instead)
        try:
            with few_retries():
                return self._tfds.get_dataset(split, shuffle, seed, shard_info, num_epochs=num_epochs)
        except Exception as error:  # TFDS raises errors of many libraries
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise SettingError(f"TFDS cannot give {self._name} ({reason}): ", *instead) from error


@contextlib.contextmanager
def few_retries() -> Iterator[None]:
    """Makes TFDS give up after a few seconds if there is no connection.

    Its default of ten retries, each after twice the previous wait, would take minutes.
    """
    log = logging.getLogger("urllib3.connectionpool")  # it logs a line per retry, and the final error is enough
    before = downloader.MAX_RETRIES, log.level
    downloader.MAX_RETRIES = RETRIES
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before[0]
        log.setLevel(before[1])


def columns_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns one tensor per field of the rows, for `tf.data`. Lists become ragged tensors; dicts remain dicts."""

    def column(values: list) -> Any:
        if isinstance(values[0], dict):
            return columns_of(values)
        if isinstance(values[0], list):
            empty = not any(values)  # TensorFlow cannot infer the dtype of empty lists
            return tf.ragged.constant(values, dtype=tf.string if empty else None, ragged_rank=1)
        return tf.constant(values)

    return {name: column([row[name] for row in rows]) for name in rows[0]}


class TextFiles(seqio.DataSource):
    """Plain text under DATA_DIR, `*.txt` (also .gz, .xz), one document per line.

    Every `holdout`-th document belongs to the validation split.
    """

    def __init__(self, holdout: int = 200):
        self._holdout = holdout
        super().__init__(splits=("train", "validation"))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return ["*.txt"]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        files = sorted(p for p in Path(_data_dir or "").glob("*.txt*") if _data_dir)
        if not files:
            raise SettingError(
                "no *.txt files under ", DATA_DIR, f" {_data_dir}: set it to a folder of text, a document a line"
            )

        def documents() -> Iterator[str]:
            index = 0
            for path in files:
                for line in read_lines(path):
                    if line := line.strip():
                        index += 1
                        if (index % self._holdout == 0) == (split == "validation"):
                            yield line

        dataset = streamed(documents)
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(10_000, seed=seed)
        return dataset.repeat(num_epochs)


def streamed(texts: Callable[[], Iterable[str]]) -> tf.data.Dataset:
    """Returns a dataset of rows {"text"}. It calls `texts()` once per epoch, and reads the texts lazily."""

    def rows() -> Iterator[Row]:
        with remembered():
            yield from ({"text": text} for text in texts())

    return tf.data.Dataset.from_generator(rows, output_signature={"text": tf.TensorSpec((), tf.string)})


def find_file(folder: str, name: str, benchmark: str | None = None) -> Path:
    """Returns `folder/name` or `folder/benchmark/name`, or one of these with .gz or .xz.

    It opens files that are missing, too: so the cache records them, and is built again once such a file appears.
    """
    for root in (folder, Path(folder, benchmark or "")):
        for suffix in ("", ".gz", ".xz"):
            path = Path(root, name + suffix)
            if path.is_file():
                return path
            if not path.exists():
                with contextlib.suppress(OSError):
                    path.open("rb").close()
    raise SettingError(f"no {name} under ", DATA_DIR, f" {folder}: set ", DATA_DIR, " to the folder that holds it")


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, which may be compressed (.gz or .xz).

    Raises:
      ValueError: a line is not UTF-8, or the file is damaged; the message names the line.
    """
    try:
        yield from lines.read_lines(path)
    except ValueError as error:
        raise SettingError(f"{error}; ", *MEND) from None


def filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number, line) for the lines that are not empty; numbers count all lines, from 1."""
    return ((number, line) for number, line in enumerate(read_lines(path), 1) if line.rstrip("\r\n"))


def read_json(text: str) -> Any:
    """Returns the JSON value of a line.

    Raises:
      ValueError: it is not JSON, is nested too deeply for Python, or has half a surrogate pair, which is not Unicode.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair (\\ud800 to \\udfff), which is no Unicode text") from None
    return found


def read_tsv(
    path: Path,
    columns: Mapping[str, Callable[[str], Any]],
    *,
    titles: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    constants: Mapping[str, Any] | None = None,
    skip_short: bool = False,
) -> Iterator[Row]:
    """Yields the rows of a GLUE file, which is tab-separated and in which quotes are not special.

    Args:
      path: the file.
      columns: by field, a function that checks and converts a cell.
      titles: by field, its title in the file, for fields that have another title there.
      header: the columns' titles; None if the file has a header line.
      constants: fields that are added to every row, such as the label -1 for a test file.
      skip_short: whether to skip rows with too few columns, as TFDS does; GLUE's QQP has some.
    """
    rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in filled_lines(path))
    header = list(header or next(rows, (1, []))[1])
    wanted = {name: (titles or {}).get(name, name) for name in columns}
    if not set(wanted.values()) <= set(header):
        raise SettingError(f"{path}, line 1: no header with the columns {', '.join(wanted.values())}; ", *MEND)
    if twice := [title for title in wanted.values() if header.count(title) > 1]:
        raise SettingError(f"{path}, line 1: two columns {twice[0]!r}, expected one; ", *MEND)
    columns_of_fields = {name: header.index(title) for name, title in wanted.items()}
    for index, (number, cells) in enumerate(rows):
        if skip_short and len(cells) < len(header):
            continue
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns, expected {len(header)}")
            row = {name: columns[name](cells[column]) for name, column in columns_of_fields.items()}
        except ValueError as error:
            raise SettingError(f"{path}, line {number}: {error}; ", *MEND) from None
        yield row | dict(constants or {}) | {"idx": index}


def read_jsonl(
    path: Path,
    columns: Mapping[str, Callable[[Any], Any]],
    *,
    constants: Mapping[str, Any] | None = None,
    flatten: Callable[[Row], Iterable[Row]] | None = None,
) -> Iterator[Row]:
    """Yields the rows of a JSON-lines file.

    Args:
      path: the file.
      columns: by field, a function that checks and converts a value.
      constants: fields that are added to every row, such as the label -1 for a test file.
      flatten: turns the nested object of a line into rows.
    """
    for index, (number, line) in enumerate(filled_lines(path)):
        try:
            found = read_json(line)
            parts = flatten(found) if flatten else (found,)
            rows = [
                {name: check(part[name]) for name, check in columns.items()} | {"idx": part.get("idx", index)}
                for part in parts
            ]
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: no field {error}; expected {', '.join(columns)}") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise SettingError(f"{path}, line {number}: {error}; ", *MEND) from None
        for row in rows:
            yield row | dict(constants or {})


def text(value: Any) -> str:
    """Checks that a cell has text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an empty or missing text: {value!r}")
    return value


def label(count: int) -> Callable[[Any], int]:
    """Returns a check that a cell is a class, 0 .. count - 1."""

    def check(value: Any) -> int:
        if str(value) not in map(str, range(count)):
            raise ValueError(f"label {value!r}, expected 0 .. {count - 1}")
        return int(value)

    return check


def any_text(value: Any) -> str:
    """Checks that a cell is text, which may be empty, as in some rows of the benchmarks."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r}, expected a text")
    return value


def texts(value: Any) -> list[str]:
    """Checks that a cell is a list of at least one text."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{value!r}, expected a list of at least one text")
    return [text(item) for item in value]


def integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r}, expected a whole number")
    return value


def label_name(names: Sequence[str]) -> Callable[[Any], int]:
    """Returns a check that a cell is the name of a class, which it converts to the class's index."""

    def check(value: Any) -> int:
        if value not in names:
            raise ValueError(f"label {value!r}, expected {', '.join(names)}")
        return names.index(value)

    return check


def truth(value: Any) -> int:
    """Checks that a label is true or false, and converts it to 1 or 0."""
    if not isinstance(value, bool):
        raise ValueError(f"label {value!r}, expected true or false")
    return int(value)


def score(low: float, high: float) -> Callable[[Any], float]:
    """Returns a check that a cell is a number from `low` to `high`."""

    def check(value: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"score {value!r}, expected {low:g} .. {high:g}")
        return number

    return check

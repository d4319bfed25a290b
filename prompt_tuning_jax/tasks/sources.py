"""Where a task's rows come from: TFDS, or the benchmark's own files under DATA_DIR.

A task's name is the same whichever it is: `set_data_dir` decides when the rows are read.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

_data_dir: str | None = None

Row = dict[str, Any]

MEND = "mend it, or set DATA_DIR to a sound copy"


def set_data_dir(path: str | None) -> None:
    """Makes every `FilesOrTfds` read its files under `path`; None goes back to TFDS."""
    global _data_dir
    _data_dir = path


class FilesOrTfds(seqio.DataSource):
    """A TFDS data set, or files with the same rows.

    Attributes:
      tfds_name: for example "glue/sst2:2.0.0"; None where there is no such data set.
      files: for each split, its file under DATA_DIR, where it may also lie compressed, with .gz or .xz after its name.
      read: yields the rows of an open file, given its path for error messages.
    """

    def __init__(
        self, tfds_name: str | None, files: Mapping[str, str], read: Callable[[Path], Iterable[Row]], **kwargs: Any
    ):
        self._name, self._tfds = tfds_name, seqio.TfdsDataSource(tfds_name) if tfds_name else None
        self._files, self._read = dict(files), read
        super().__init__(splits=tuple(files), **kwargs)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [self._files[split]]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        if _data_dir is None:
            if self._tfds is None:
                raise ValueError(f"these rows are not in TFDS: set DATA_DIR to the folder with {self._files[split]}")
            try:
                return self._tfds.get_dataset(split, shuffle, seed, shard_info, num_epochs=num_epochs)
            except Exception as error:  # it raises what its own libraries do
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                raise ValueError(
                    f"TFDS cannot give {self._name} ({reason}): set DATA_DIR to the folder with {self._files[split]}"
                ) from error
        rows = list(self._read(find_file(_data_dir, self._files[split])))
        if not rows:
            raise ValueError(f"{self._files[split]} under DATA_DIR {_data_dir} has no rows")
        dataset = tf.data.Dataset.from_tensor_slices({name: [row[name] for row in rows] for name in rows[0]})
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(len(rows), seed=seed)
        return dataset.repeat(num_epochs)


class TextFiles(seqio.DataSource):
    """Plain text under DATA_DIR, `*.txt` (also .gz, .xz), one document a line; every `holdout`-th is for validation."""

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
            raise ValueError(
                f"no *.txt files under DATA_DIR {_data_dir}: set it to a folder of text, a document a line"
            )

        def documents() -> Iterator[str]:
            index = 0
            for path in files:
                for line in read_lines(path):
                    if line := line.strip():
                        index += 1
                        if (index % self._holdout == 0) == (split == "validation"):
                            yield line

        dataset = tf.data.Dataset.from_generator(
            lambda: ({"text": text} for text in documents()), output_signature={"text": tf.TensorSpec((), tf.string)}
        )
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(10_000, seed=seed)
        return dataset.repeat(num_epochs)


def find_file(folder: str, name: str) -> Path:
    """`folder/name`, or the same compressed."""
    for suffix in ("", ".gz", ".xz"):
        path = Path(folder, name + suffix)
        if path.is_file():
            return path
    raise ValueError(f"no {name} under DATA_DIR {folder}: set DATA_DIR to the folder that holds it")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain, .gz or .xz, as UTF-8.

    Raises:
      ValueError: a line is not UTF-8, or the file not whole; it names the line.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rb") as lines:
            for line in lines:
                number += 1
                yield line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason}); {MEND}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}, after line {number}: cannot be read ({error}); {MEND}") from None


def read_tsv(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> Iterator[Row]:
    """Rows of a GLUE file: tab-separated with a header, quotes not special; `columns` checks and turns each cell."""
    rows = (line.rstrip("\r\n").split("\t") for line in read_lines(path))
    header = next(rows, [])
    if not set(columns) <= set(header):
        raise ValueError(f"{path}, line 1: no header with the columns {', '.join(columns)}; {MEND}")
    places = {name: header.index(name) for name in columns}
    for index, cells in enumerate(rows):
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns, expected {len(header)}")
            row = {name: columns[name](cells[place]) for name, place in places.items()}
        except ValueError as error:
            raise ValueError(f"{path}, line {index + 2}: {error}; {MEND}") from None
        yield row | {"idx": index}


def read_jsonl(path: Path, columns: Mapping[str, Callable[[Any], Any]]) -> Iterator[Row]:
    """Rows of a JSON-lines file; `columns` checks and turns each field."""
    for index, line in enumerate(read_lines(path)):
        try:
            found = json.loads(line)
            row = {name: check(found[name]) for name, check in columns.items()} | {"idx": found.get("idx", index)}
        except KeyError as error:
            raise ValueError(f"{path}, line {index + 1}: no field {error}; expected {', '.join(columns)}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {index + 1}: {error}; {MEND}") from None
        yield row


def text(value: Any) -> str:
    """A cell that must hold some text."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"an empty or missing text: {value!r}")
    return value


def label(count: int) -> Callable[[Any], int]:
    """A cell that must hold a class, 0 .. count - 1."""

    def check(value: Any) -> int:
        if str(value) not in map(str, range(count)):
            raise ValueError(f"label {value!r}, expected 0 .. {count - 1}")
        return int(value)

    return check

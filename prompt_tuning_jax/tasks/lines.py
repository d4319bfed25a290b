"""Reads the lines of text files, plain or compressed, without TensorFlow."""

import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning_jax.regular_files import regular


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 text file, which may be compressed (.gz or .xz).

    Raises:
      ValueError: a line is not UTF-8, or the file cannot be read to its end; the message names the file and the line.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(regular(path), "rb") as lines:
            for line in lines:
                number += 1
                text = line.decode("utf-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}, after line {number}: cannot be read ({error})") from None

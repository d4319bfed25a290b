"""Opens arrays that are in one file, or in shards with an index, by Hugging Face's names of files."""

import json
from collections.abc import Callable
from pathlib import Path

from prompt_tuning_jax.array_files.stored import ArrayError, StoredArray, first_line
from prompt_tuning_jax.regular_files import regular

INDEX = ".index.json"


def open_shards(folder: Path, name: str, open_file: Callable[[Path], dict[str, StoredArray]]) -> dict[str, StoredArray]:
    """Opens the arrays of the file `name`, or of the shards that `<name>.index.json` lists.

    Args:
      open_file: opens one file.

    Raises:
      ArrayError: there is no such file, it cannot be opened, or a shard lacks an array that the index says it has.
    """
    whole, index = folder / name, folder / f"{name}{INDEX}"
    if whole.is_file() or not index.is_file():
        return open_file(whole)
    arrays, shard_of = {}, read_index(index)
    # An array that is in two shards is taken from the one that the index names.
    for shard in sorted(set(shard_of.values())):
        found = open_file(folder / shard)
        arrays |= {name: array for name, array in found.items() if shard_of.get(name, shard) == shard}
    lacking = [name for name in shard_of if name not in arrays]
    if lacking:
        raise ArrayError(f"{folder / shard_of[lacking[0]]} lacks {lacking[0]}, which {index.name} says it has")
    return arrays


def read_index(index: Path) -> dict[str, str]:
    """Returns the shard of each array, by the array's name.

    Raises:
      ArrayError: the file is not an index, or names a shard in another folder.
    """
    try:
        shard_of = json.loads(regular(index).read_bytes())["weight_map"]
        shards = set(shard_of.values())
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("shards are named as files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArrayError(f"{index} is not an index of shards ({first_line(error)})") from None
    return shard_of

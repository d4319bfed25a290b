"""Helps to make tasks from parts of other tasks: the same rows and texts with other splits, metrics or targets."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import seqio

from prompt_tuning_jax.errors import Setting, SettingError


class Parts(NamedTuple):
    """Holds the parts of a registered task.

    Attributes:
      source: the source of its rows.
      text_format: the preprocessors that turn a row into `inputs` and `targets`.
      postprocess: its postprocessor.
      metrics: its metrics.
      labels: its closed set of answers, or None.
    """

    source: seqio.DataSource
    text_format: list[Callable]
    postprocess: Callable
    metrics: list[Callable]
    labels: tuple[str, ...] | None


def parts_of(name: str) -> Parts:
    """Returns the parts of a registered task."""
    task = seqio.TaskRegistry.get(name)
    tokenise = task.preprocessors.index(seqio.preprocessors.tokenize)
    labels = getattr(task.postprocessor, "keywords", {}).get("labels")
    return Parts(task.source, [*task.preprocessors[:tokenise]], task.postprocessor, [*task.metric_fns], labels)


def wrapped(wrapper: Callable, postprocess: Callable, **options: Any) -> functools.partial:
    """Returns `wrapper`, a function of `wrapped_postprocessors`, with `postprocess` (of `postprocessors`) inside."""
    inner = getattr(postprocess, "keywords", {})
    function = getattr(postprocess, "func", postprocess)
    return functools.partial(wrapper, postprocess=function.__name__, **inner | options)


class Splits(seqio.DataSource):
    """Source that renames another source's splits, or makes slices of them: {"validation": "train[-500:]"}."""

    def __init__(self, source: seqio.DataSource, splits: Mapping[str, str]):
        self._source, self._slices = source, dict(splits)
        super().__init__(splits=tuple(splits))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, *, num_epochs=1):
        match = re.fullmatch(r"(\w+)(?:\[(-?\d+)?:(-?\d+)?\])?", self._slices[split])
        assert match, f"{self._slices[split]} is no slice of a split"
        name, start, stop = match.groups()
        if start is None and stop is None:
            return self._source.get_dataset(name, shuffle, seed, shard_info, num_epochs=num_epochs)
        # Slices are taken here, from unshuffled rows, so that files and TFDS give the same slices.
        dataset = self._source.get_dataset(name, shuffle=False)
        count = int(dataset.cardinality())
        if count < 0:
            count = int(dataset.reduce(0, lambda seen, _: seen + 1))
        rows = range(count)[slice(int(start) if start else None, int(stop) if stop else None)]
        if not rows:
            raise SettingError(
                f"{self._slices[split]} of {count} rows is empty: set ", Setting("data_dir"), " to the whole data set"
            )
        dataset = dataset.skip(rows.start).take(len(rows))
        if shard_info and shard_info.num_shards > 1:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        if shuffle:
            dataset = dataset.shuffle(len(rows), seed=seed)
        return dataset.repeat(num_epochs)

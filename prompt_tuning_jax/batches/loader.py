"""Batches as a function of seed and step: shuffled, bucketed by length, resumable at any step by its number alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.batches.cache import Examples
from prompt_tuning_jax.tasks.vocabularies import trim


class Batch(NamedTuple):
    """Padded token ids; rows without an example are all 0 and have id -1.

    Attributes:
      inputs, targets: 0 is padding.
      ids: the place of each row's example in its split.
    """

    inputs: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B U"]
    ids: Int[np.ndarray, " B"]


def default_buckets(length: int, shortest: int = 16) -> tuple[int, ...]:
    """Lengths that batches are padded to: `shortest`, then 3/2 and 2 times it, and so on up to `length` itself."""
    steps = (shortest * factor * 2**n // 2 for n in range(20) for factor in (2, 3))
    return (*(step for step in steps if step < length), length)


class Batches:
    """All batches of a split, by number; an endless sequence where `shuffle`, one pass otherwise.

    Each epoch visits every example once. A bucket's last, incomplete batch is topped up from the next longer bucket's
    examples; what is left at the end of an epoch is a batch with empty rows.

    Attributes:
      lengths: TASK_FEATURE_LENGTHS; longer rows are cut, their end of sequence kept.
      buckets: input lengths to pad to, ascending; the last is lengths["inputs"]. A batch's targets are padded to the
        least of `target_buckets` that holds its longest.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        lengths: Mapping[str, int],
        *,
        seed: int = 0,
        shuffle: bool = True,
        buckets: Sequence[int] | None = None,
    ):
        self.examples, self.batch_size, self.lengths = examples, batch_size, dict(lengths)
        self.buckets = tuple(buckets or default_buckets(lengths["inputs"]))
        self.target_buckets = default_buckets(lengths["targets"], shortest=8)
        self._seed, self._shuffle = seed, shuffle
        rows = np.minimum(examples.inputs.lengths[examples.rows], lengths["inputs"])
        self._bucket_of = np.searchsorted(self.buckets, rows)
        self._epoch, self._plan = -1, []

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def _planned(self, epoch: int) -> list[Int[np.ndarray, " n"]]:
        if epoch == self._epoch:
            return self._plan
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self.examples)) if self._shuffle else np.arange(len(self.examples))
        # Stable: within a bucket the order stays random (or the split's).
        order = order[np.argsort(self._bucket_of[order], kind="stable")]
        plan = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        if self._shuffle:
            plan = [plan[i] for i in rng.permutation(len(plan))]
        self._epoch, self._plan = epoch, plan
        return plan

    def __getitem__(self, number: int) -> Batch:
        epoch, place = divmod(number, len(self))
        members = self._planned(epoch)[place]
        rows = self.examples.rows[members]
        width = self.buckets[self._bucket_of[members].max()]
        inputs = np.zeros((self.batch_size, width), np.int32)
        longest = min(self.examples.targets.lengths[rows].max(), self.lengths["targets"])
        target_width = self.target_buckets[np.searchsorted(self.target_buckets, longest)]
        targets = np.zeros((self.batch_size, target_width), np.int32)
        ids = np.full(self.batch_size, -1, np.int32)
        ids[: len(members)] = members
        for at, row in enumerate(rows):
            tokens = trim(self.examples.inputs[row], self.lengths["inputs"])
            inputs[at, : len(tokens)] = tokens
            tokens = trim(self.examples.targets[row], self.lengths["targets"])
            targets[at, : len(tokens)] = tokens
        return Batch(inputs, targets, ids)

    def examples_before(self, step: int) -> int:
        """Examples in batches 0 to `step - 1`."""
        epochs, place = divmod(step, len(self))
        return epochs * len(self.examples) + sum(map(len, self._planned(epochs)[:place]))

    def start_at(self, step: int, stop: int) -> Iterator[Batch]:
        """Batches `step` to `stop - 1`, read ahead by a thread."""
        source = _Window(self, step, stop)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)  # one: epochs are planned in order
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class _Window:
    """Batches `start` to `stop - 1` as a random-access source of Grain's."""

    def __init__(self, batches: Batches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> Batch:
        return self._batches[self._start + index]

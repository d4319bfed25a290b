"""Makes batches as a function of seed and step: shuffled, bucketed by length, and resumable at any step."""

import abc
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from prompt_tuning_jax.batches.cache import Part, TaskRequest
from prompt_tuning_jax.batches.child import Child
from prompt_tuning_jax.batches.examples import Examples, hash_of
from prompt_tuning_jax.batches.mixing import Mixing
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.tokenizers.vocabulary import trim

MIXTURE_WINDOW, STREAM_WINDOW = 64, 16  # batches per window; see `PlannedBatches`


class Batch(NamedTuple):
    """Holds padded token ids. Rows without an example contain only padding and have id -1.

    Attributes:
      inputs, targets: token ids, padded with `PlannedBatches.pad`.
      ids: the index of each row's example in its split. For a mixture, the splits of its tasks are concatenated; for a
        stream, it is the index in the stream.
      tasks: the index of each row's prompt if the method has one prompt per task, otherwise None. The run sets it.
    """

    inputs: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B U"]
    ids: Int[np.ndarray, " B"]
    tasks: Int[np.ndarray, " B"] | None = None


def default_buckets(length: int, shortest: int = 16) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to: `shortest`, 3/2 of it, 2 times it, and so on up to `length`."""
    steps = (shortest * factor * 2**n // 2 for n in range(20) for factor in (2, 3))
    return (*(step for step in steps if step < length), length)


class PlannedBatches(abc.ABC):
    """An endless sequence of batches, indexed by number and planned one window of batches at a time.

    A window's examples are put into a random order by the seed, sorted by bucket, and divided into batches, which are
    then shuffled. So the examples of a batch have similar lengths. The last, incomplete batch of a bucket is filled
    with examples of the next longer bucket.

    With several processes, each process has its own rows of the same global batches, which do not depend on the number
    of processes.

    Attributes:
      batch_size: rows per global batch.
      lengths: TASK_FEATURE_LENGTHS; longer rows are truncated, but keep their end of sequence.
      buckets: input lengths to pad to, ascending; the last is lengths["inputs"].
      target_buckets: target lengths to pad to, ascending. A batch uses the smallest that fits its longest target.
      window: batches per window.
      pad: the id of padding, which is 0 for T5.
    """

    window: int

    def __init__(
        self,
        batch_size: int,
        lengths: Mapping[str, int],
        *,
        seed: int = 0,
        shuffle: bool = True,
        buckets: Sequence[int] | None = None,
        pad: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Raises ValueError if `batch_size` is not a multiple of `process_count`."""
        if batch_size % process_count:
            raise SettingError(
                Setting("batch_size"),
                f" is {batch_size}, which {process_count} processes cannot share equally: set it to a multiple of "
                f"{process_count}",
            )
        self.batch_size, self.lengths = batch_size, dict(lengths)
        self.buckets = tuple(buckets or default_buckets(lengths["inputs"]))
        self.target_buckets = default_buckets(lengths["targets"], shortest=8)
        self.pad, self._seed, self._shuffle = pad, seed, shuffle
        share = batch_size // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)
        self._planned, self._plan = -1, []

    @abc.abstractmethod
    def _draw(self, window: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        """Returns the ids of a window's examples in the seed's order, enough for at most `self.window` batches."""

    @abc.abstractmethod
    def _input_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]: ...

    @abc.abstractmethod
    def _target_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]: ...

    @abc.abstractmethod
    def _tokens(self, example_id: int) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
        """Returns the tokens, before truncation, of an example of the window that was drawn last."""

    @abc.abstractmethod
    def examples_before(self, step: int) -> int:
        """Returns the number of examples in batches 0 to `step - 1`, over all processes."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Returns a hash of the data in the batches, independent of its name, as 16 hexadecimal digits."""

    def _bucket_indices(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.searchsorted(self.buckets, np.minimum(self._input_lengths(ids), self.lengths["inputs"]))

    def _batches_of(self, window: int) -> list[Int[np.ndarray, " n"]]:
        """Returns the ids of the examples in each batch of a window."""
        if window != self._planned:
            rng = np.random.default_rng([self._seed, window])
            order = self._draw(window, rng)
            # A stable sort keeps the order within a bucket: random, or that of the split.
            order = order[np.argsort(self._bucket_indices(order), kind="stable")]
            plan = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
            if self._shuffle:
                # This permutation does not depend on the seed: trials that differ only in their seed then have batches
                # of similar shapes at each step, so sharing an executable needs little padding.
                permutation = np.random.default_rng(window).permutation(len(plan))
                plan = [plan[index] for index in permutation]
            self._planned, self._plan = window, plan
        return self._plan

    def shapes(self, count: int) -> list[tuple[int, int]]:
        """Returns the widths T of inputs and U of targets for batches 0 to `count - 1`."""
        batches = (divmod(number, self.window) for number in range(count))
        return [self._widths(self._batches_of(window)[index]) for window, index in batches]

    def _widths(self, members: Int[np.ndarray, " n"]) -> tuple[int, int]:
        longest = min(int(self._target_lengths(members).max()), self.lengths["targets"])
        target_width = self.target_buckets[np.searchsorted(self.target_buckets, longest)]
        return self.buckets[self._bucket_indices(members).max()], target_width

    def __getitem__(self, number: int) -> Batch:
        window, index = divmod(number, self.window)
        members = self._batches_of(window)[index]
        width, target_width = self._widths(members)
        ids = np.full(self.batch_size, -1, np.int32)
        ids[: len(members)] = members
        ids = ids[self._own]
        inputs = np.full((len(ids), width), self.pad, np.int32)
        targets = np.full((len(ids), target_width), self.pad, np.int32)
        for slot, member in enumerate(ids[ids >= 0].tolist()):
            for row, name, tokens in zip((inputs, targets), ("inputs", "targets"), self._tokens(member), strict=True):
                tokens = trim(tokens, self.lengths[name])
                row[slot, : len(tokens)] = tokens
        return Batch(inputs, targets, ids)

    def start_at(self, step: int, stop: int) -> Iterator[Batch]:
        """Returns an iterator over batches `step` to `stop - 1`, which a thread reads ahead."""
        import grain  # imported here because it imports JAX, which indexing a batch does not need

        source = _BatchRange(self, step, stop)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)  # windows are planned in order
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class Batches(PlannedBatches):
    """Batches of one split. A window is an epoch, which visits every example once.

    If the examples do not fill the last batch of an epoch, that batch has empty rows.
    """

    def __init__(self, examples: Examples, batch_size: int, lengths: Mapping[str, int], **options: Any):
        """Takes the options of `PlannedBatches`. Without `shuffle`, each bucket has the order of the split."""
        super().__init__(batch_size, lengths, **options)
        self.examples, self.window = examples, -(-len(examples) // batch_size)

    def __len__(self) -> int:
        """Returns the number of batches per epoch."""
        return self.window

    def in_order(self, predict: Callable[[Batch], Sequence[Any]]) -> list[Any]:
        """Calls `predict` on each batch of an epoch, and returns its values per row in the order of the split."""
        found: list[Any] = [None] * len(self.examples)
        for number in range(len(self)):
            batch = self[number]
            for index, value in zip(batch.ids, predict(batch), strict=True):
                if index >= 0:
                    found[index] = value
        return found

    def _draw(self, window: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        return rng.permutation(len(self.examples)) if self._shuffle else np.arange(len(self.examples))

    def _input_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.examples.inputs.lengths[self.examples.rows[ids]]

    def _target_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.examples.targets.lengths[self.examples.rows[ids]]

    def _tokens(self, example_id: int) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
        row = self.examples.rows[example_id]
        return self.examples.inputs[row], self.examples.targets[row]

    def examples_before(self, step: int) -> int:
        epochs, index = divmod(step, self.window)
        return epochs * len(self.examples) + sum(map(len, self._batches_of(epochs)[:index]))

    def fingerprint(self) -> str:
        return self.examples.fingerprint()


class MixedBatches(PlannedBatches):
    """Batches of several tasks, drawn in proportion to their rates.

    A batch mixes the examples of all tasks that have similar lengths. Each task has its own epochs, each of which
    visits every example of the task once. At the end of each window, each task is within one example of its share.

    Attributes:
      parts: the tasks by name, with rates above 0.
      starts: the id of each task's first example, by the task's name.
    """

    window = MIXTURE_WINDOW

    def __init__(self, parts: Mapping[str, Part], batch_size: int, lengths: Mapping[str, int], **options: Any):
        """Takes the options of `PlannedBatches`."""
        super().__init__(batch_size, lengths, **options)
        self.parts = dict(parts)
        self._examples = [part.examples for part in self.parts.values()]
        self._mixing = Mixing([part.rate for part in self.parts.values()], self._seed)
        sizes = [len(examples) for examples in self._examples]
        self.starts = dict(zip(self.parts, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self._starts = np.array([*self.starts.values()])
        self._lengths = [
            np.concatenate([getattr(part, name).lengths[part.rows] for part in self._examples])
            for name in ("inputs", "targets")
        ]
        self._epochs: dict[int, tuple[int, Int[np.ndarray, " n"]]] = {}

    def _draw(self, window: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        size = self.window * self.batch_size
        before, after = (self._mixing.counts(number) for number in (window * size, (window + 1) * size))
        drawn = [
            start + np.concatenate([*self._visits(task, int(first), int(last))])
            for task, (start, first, last) in enumerate(zip(self._starts, before, after, strict=True))
        ]
        return rng.permutation(np.concatenate(drawn))

    def _visits(self, task: int, first: int, last: int) -> Iterator[Int[np.ndarray, " n"]]:
        """Yields arrays of the indices of the examples that are draws `first` to `last - 1` of a task."""
        size = len(self._examples[task])
        yield np.zeros(0, np.int64)
        for epoch in range(first // size, -(-last // size)):
            if self._epochs.get(task, (-1,))[0] != epoch:
                order = np.random.default_rng([self._seed, task, epoch]).permutation(size)
                self._epochs[task] = epoch, order
            yield self._epochs[task][1][max(first - epoch * size, 0) : last - epoch * size]

    def _input_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._lengths[0][ids]

    def _target_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._lengths[1][ids]

    def tasks_of(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the index in `parts` of each example's task."""
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _tokens(self, example_id: int) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
        task = int(np.searchsorted(self._starts, example_id, side="right")) - 1
        examples = self._examples[task]
        row = examples.rows[example_id - self._starts[task]]
        return examples.inputs[row], examples.targets[row]

    def examples_before(self, step: int) -> int:
        return step * self.batch_size

    def fingerprint(self) -> str:
        return hash_of([(part.rate, part.examples.fingerprint()) for part in self.parts.values()])


class StreamedBatches(PlannedBatches):
    """Batches of a corpus that is too large to cache, which a child process tokenises while it is read.

    The child starts when the first batch is asked for, waits while it is ahead of the reader, and ends with this object
    or this process, even if the process is killed. Here too a batch is a function of seed and number. But to start at
    batch n, the child must read and tokenise everything before it, so resuming takes about as long as tokenising that
    far took. With several processes, the child of each tokenises the whole corpus, and each process takes its own rows.
    """

    window = STREAM_WINDOW

    def __init__(self, request: TaskRequest, split: str, batch_size: int, lengths: Mapping[str, int], **options: Any):
        """Takes the options of `PlannedBatches`."""
        super().__init__(batch_size, lengths, **options)
        self._request, self._split = request, split
        self._child: Child | None = None
        self._next = -1  # the window that the child writes next
        self._first, self._examples = 0, []

    def _draw(self, window: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
        size = self.window * self.batch_size
        child = self._child
        if child is None or window != self._next:
            if child is not None:
                child.close()
            child = self._child = self._start(window * size)
        self._examples = [self._read(child) for _ in range(size)]
        self._first, self._next = window * size, window + 1
        return self._first + rng.permutation(size)

    def _start(self, example: int) -> Child:
        """Starts a child process that writes the stream from example number `example` on."""
        child_request = self._request.to_child_request(split=self._split, seed=self._seed, start=example)
        what = f"tokenising {self._request.name}, {self._split}"
        return Child("prompt_tuning_jax.batches.stream", child_request, what, pipe=True)

    def _read(self, child: Child) -> list[Int[np.ndarray, " length"]]:
        """Reads the next example's inputs and targets: both lengths, then both token lists, in little-endian int32."""
        header = child.stdout.read(8)
        lengths = struct.unpack("<II", header) if len(header) == 8 else (0, 0)
        data = child.stdout.read(4 * sum(lengths))
        if len(header) < 8 or len(data) < 4 * sum(lengths):
            child.finish()  # raises the error with which the child ended
            raise ChildProcessError(f"tokenising {self._request.name} ended before its time")
        tokens = np.frombuffer(data, "<i4").astype(np.int32)
        return np.split(tokens, [lengths[0]])

    def _lengths_of(self, part: int, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return np.array([len(self._examples[example_id - self._first][part]) for example_id in ids])

    def _input_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._lengths_of(0, ids)

    def _target_lengths(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self._lengths_of(1, ids)

    def _tokens(self, example_id: int) -> tuple[Int[np.ndarray, " inputs"], Int[np.ndarray, " targets"]]:
        inputs, targets = self._examples[example_id - self._first]
        return inputs, targets

    def examples_before(self, step: int) -> int:
        return step * self.batch_size

    def fingerprint(self) -> str:
        """Returns a hash of the task, the folder of its files and the split. It does not cover the tokens."""
        return hash_of(self._request.fingerprint(), self._split)


class _BatchRange:
    """A random-access source for Grain that has batches `start` to `stop - 1`."""

    def __init__(self, batches: PlannedBatches, start: int, stop: int):
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return max(self._stop - self._start, 0)

    def __getitem__(self, index: int) -> Batch:
        return self._batches[self._start + index]

"""One split of a task or mixture as a run names it: what to read, how long, in batches of how many."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from prompt_tuning_jax.batches.cache import Part, TaskRequest, load_tasks, split_rows
from prompt_tuning_jax.batches.loader import Batches, MixedBatches, Planned, StreamedBatches
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tasks.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The fields of T5X's `DatasetConfig`, and where the rows are.

    Attributes:
      split: a split's name or a slice of one, "train[:-2000]"; of a mixture, of each of its tasks that has it.
      task_feature_lengths: TASK_FEATURE_LENGTHS, tokens with the end of sequence.
      module: MIXTURE_OR_TASK_MODULE, imported to register the task; None for this project's own.
      data_dir: the benchmark's own files; None for TFDS.
      cache_dir: where tokens are kept; None for the user's cache.
      buckets: input lengths to pad to; None for powers of two and the lengths midway between them.
      use_cached: tokenise once and keep the tokens; False for a corpus too large for it, which is then tokenised as
        training reads it. Evaluation always keeps them.
      files: a user's own files, which MIXTURE_OR_TASK_NAME then names; None for a registered task.
    """

    mixture_or_task_name: str
    split: str
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    module: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    buckets: Sequence[int] | None = None
    use_cached: bool = True
    files: TaskFiles | None = None

    def batches(
        self,
        vocabulary: Vocabulary,
        *,
        seed: int = 0,
        shuffle: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Planned:
        """The batches to train on, tokenised first where they are not yet. Says on stderr how many rows are cut.

        A mixture of several tasks is drawn by rate, and so always shuffled; so is what is not cached.

        Args:
          process_index, process_count: which of how many processes this is: each has its rows of the same batches.

        Raises:
          ValueError: the task, split or data is not there or not sound.
        """
        lengths = self.checked_lengths()
        options = {
            "seed": seed,
            "buckets": self.buckets,
            "process_index": process_index,
            "process_count": process_count,
        }
        if not self.use_cached:
            name, rows = split_rows(self.split)
            if rows != slice(None):
                raise ValueError(
                    f"split {self.split!r} is a slice, which USE_CACHED_TASKS=False cannot read: "
                    "set TRAIN_SPLIT to a whole split"
                )
            return StreamedBatches(self._request(vocabulary), name, self.batch_size, lengths, **options)
        parts = self._load(vocabulary, to_train=True)
        if len(parts) > 1:
            return MixedBatches(parts, self.batch_size, lengths, **options)
        examples = next(iter(parts.values())).examples
        return Batches(examples, self.batch_size, lengths, shuffle=shuffle, **options)

    def eval_batches(
        self, vocabulary: Vocabulary, *, process_index: int = 0, process_count: int = 1
    ) -> dict[str, Batches]:
        """One pass over the split of each task that has it, by the task's name.

        Raises:
          ValueError: as `batches`.
        """
        lengths = self.checked_lengths()
        options = {"buckets": self.buckets, "process_index": process_index, "process_count": process_count}
        return {
            name: Batches(part.examples, self.batch_size, lengths, shuffle=False, **options)
            for name, part in self._load(vocabulary, to_train=False).items()
        }

    def checked_lengths(self) -> dict[str, int]:
        if self.batch_size < 1:
            raise ValueError(f"BATCH_SIZE is {self.batch_size}, expected at least 1")
        missing = [name for name in ("inputs", "targets") if self.task_feature_lengths.get(name, 0) < 1]
        if missing:
            raise ValueError(f"TASK_FEATURE_LENGTHS gives no length for {' and '.join(missing)}")
        return {name: int(self.task_feature_lengths[name]) for name in ("inputs", "targets")}

    def _request(self, vocabulary: Vocabulary) -> TaskRequest:
        modules = (self.module,) if self.module else ()
        lengths = self.checked_lengths()
        return TaskRequest(self.mixture_or_task_name, vocabulary.path, lengths, self.data_dir, modules, self.files)

    def _load(self, vocabulary: Vocabulary, to_train: bool) -> dict[str, Part]:
        lengths = self.checked_lengths()
        parts = load_tasks(self._request(vocabulary), self.split, self.cache_dir, to_train=to_train)
        for task, (_, examples) in parts.items():
            cut = {name: count for name, count in examples.cut(lengths).items() if count}
            if cut:
                what = " and ".join(f"{name} of {count}" for name, count in cut.items())
                print(
                    f"{task} {self.split}: TASK_FEATURE_LENGTHS {lengths} cuts {what} of {len(examples)} examples",
                    file=sys.stderr,
                )
        return parts

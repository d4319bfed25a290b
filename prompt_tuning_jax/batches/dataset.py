"""One split of a task as a run names it: what to read, how long, in batches of how many."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence

from prompt_tuning_jax.batches.cache import TaskRequest, load_split
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.tasks.vocabularies import Vocabulary


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The fields of T5X's `DatasetConfig`, and where the rows are.

    Attributes:
      split: a split's name or a slice of one, "train[:-2000]".
      task_feature_lengths: TASK_FEATURE_LENGTHS, tokens with the end of sequence.
      module: MIXTURE_OR_TASK_MODULE, imported to register the task; None for this project's own.
      data_dir: the benchmark's own files; None for TFDS.
      cache_dir: where tokens are kept; None for the user's cache.
      buckets: input lengths to pad to; None for powers of two.
    """

    mixture_or_task_name: str
    split: str
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    module: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    buckets: Sequence[int] | None = None

    def batches(self, vocabulary: Vocabulary, *, seed: int = 0, shuffle: bool = False) -> Batches:
        """The split's batches, tokenised first where they are not yet. Says on stderr how many rows are cut.

        Raises:
          ValueError: the task, split or data is not there or not sound.
        """
        if self.batch_size < 1:
            raise ValueError(f"BATCH_SIZE is {self.batch_size}, expected at least 1")
        missing = [name for name in ("inputs", "targets") if self.task_feature_lengths.get(name, 0) < 1]
        if missing:
            raise ValueError(f"TASK_FEATURE_LENGTHS gives no length for {' and '.join(missing)}")
        lengths = {name: int(self.task_feature_lengths[name]) for name in ("inputs", "targets")}
        modules = (self.module,) if self.module else ()
        request = TaskRequest(self.mixture_or_task_name, vocabulary.path, lengths, self.data_dir, modules)
        examples = load_split(request, self.split, self.cache_dir)
        cut = {name: count for name, count in examples.cut(lengths).items() if count}
        if cut:
            what = " and ".join(f"{name} of {count}" for name, count in cut.items())
            print(
                f"{self.mixture_or_task_name} {self.split}: TASK_FEATURE_LENGTHS {lengths} cuts {what} "
                f"of {len(examples)} examples",
                file=sys.stderr,
            )
        return Batches(examples, self.batch_size, lengths, seed=seed, shuffle=shuffle, buckets=self.buckets)

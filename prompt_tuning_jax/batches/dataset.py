"""Configures one split of a task or mixture: which rows to read, their lengths, and the batch size."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import numpy as np

from prompt_tuning_jax.batches.cache import (
    Part,
    TaskRequest,
    empty_split_error,
    load_tasks,
    no_split_error,
    split_rows,
    to_stderr,
)
from prompt_tuning_jax.batches.examples import Examples, hash_of, tokenize_rows
from prompt_tuning_jax.batches.loader import Batches, MixedBatches, PlannedBatches, StreamedBatches
from prompt_tuning_jax.errors import Setting, SettingError, message_text, renamed
from prompt_tuning_jax.settings import (
    Count,
    Counts,
    InstanceOf,
    Lengths,
    MappingOf,
    Name,
    Switch,
    Text,
    check,
    check_fields,
    keep_plain,
)
from prompt_tuning_jax.tasks.data_check import (
    MOST_INPUTS,
    DataCheck,
    blocks,
    check_something_left,
    check_trimmed_labels,
    row_hashes,
    shared_inputs_warning,
    truncated_labels_warning,
)
from prompt_tuning_jax.tasks.postprocessors import answers
from prompt_tuning_jax.tasks.rows import RowSource, scoring
from prompt_tuning_jax.tasks.user_files import TaskFiles
from prompt_tuning_jax.tokenizers.vocabulary import Vocabulary

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Has the fields of T5X's `DatasetConfig`, and fields that say where the rows are.

    Attributes:
      mixture_or_task_name: the SeqIO task or mixture; with `source`, the name of its rows in records and messages.
      split: a split's name or a slice of one, "train[:-2000]". For a mixture, it is read from each task that has it.
      batch_size: rows per global batch.
      task_feature_lengths: TASK_FEATURE_LENGTHS, in tokens, including the end of sequence.
      module: MIXTURE_OR_TASK_MODULE, a module to import because it registers the task; None for this project's tasks.
      data_dir: the folder of the benchmark's own files; None for TFDS.
      cache_dir: the folder of the token cache; None for the user's cache.
      buckets: input lengths to pad to; None for powers of two and the lengths midway between them.
      use_cached: whether to tokenise once and cache the tokens. False is for a corpus that is too large for a cache:
        training then tokenises it while reading it. Evaluation always uses the cache.
      source: returns rows of text, which are tokenised in this process each time, without SeqIO, a child process or the
        cache; `data_dir`, `cache_dir` and `use_cached` are then ignored. None for a registered task.
      tasks: the configurations of several tasks by name. Each task is read with its own configuration, and training
        draws from the tasks in proportion to their rows. Of this configuration only the name, split, lengths, batch
        size and buckets are then used.
    """

    mixture_or_task_name: Name
    split: Name
    batch_size: Count
    task_feature_lengths: Lengths
    module: Text | None = None
    data_dir: Text | None = None
    cache_dir: Text | None = None
    buckets: Counts | None = None
    use_cached: Switch = True
    source: Annotated[RowSource | Any, InstanceOf(RowSource)] | None = None
    tasks: Mapping[str, "DatasetConfig"] | Any = None

    def __post_init__(self):
        keep_plain(self)

    def check(self) -> None:
        """Raises SettingError if a field does not match its annotation. Reads no data."""
        names = {"module": "mixture_or_task_module", "use_cached": "use_cached_tasks", "split": "train_split"}
        with renamed(**names):
            check_fields(self)
        if self.tasks is not None:
            check("tasks", self.tasks, MappingOf(InstanceOf(DatasetConfig)))
            if not self.tasks:
                raise SettingError(Setting("tasks"), " is {}, expected at least one task")
            for task in self.tasks.values():
                task.check()

    def batches(
        self,
        vocabulary: Vocabulary,
        *,
        seed: int = 0,
        shuffle: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        then: "DatasetConfig | None" = None,
        say: Say | None = to_stderr,
    ) -> PlannedBatches:
        """Returns the batches to train on. First tokenises rows that are not in the cache.

        A mixture of several tasks is drawn by rate, so it is always shuffled. Data that is not cached is always
        shuffled, too.

        Args:
          vocabulary: the tokenizer.
          seed: determines the order of the rows.
          shuffle: whether to shuffle the rows of a single cached task.
          process_index, process_count: this process's index, and the number of processes. Each process has its own rows
            of the same global batches.
          then: the dataset that will be read next. If its rows are of the same task, one process tokenises both.
          say: is called with each line that reports what is tokenised, how many rows are truncated, and what else in
            the data may be a mistake (see `DataCheck`). None skips these checks and shows no progress bar.

        Raises:
          ValueError: the task, split or data is missing or invalid.
        """
        lengths = self.checked_lengths()
        options = {
            "seed": seed,
            "buckets": self.buckets,
            "pad": vocabulary.pad_id,
            "process_index": process_index,
            "process_count": process_count,
        }
        if not self.use_cached and self.source is None and self.tasks is None:
            name, rows = split_rows(self.split)
            if rows != slice(None):
                raise SettingError(
                    f"split {self.split!r} is a slice, which ", Setting("use_cached_tasks"), "=False cannot read: set ",
                    Setting("train_split"), " to a whole split",
                )  # fmt: skip
            return StreamedBatches(self._request(vocabulary), name, self.batch_size, lengths, **options)
        parts = self._load(vocabulary, to_train=True, then=then, say=say)
        if len(parts) > 1:
            return MixedBatches(parts, self.batch_size, lengths, **options)
        ((task, (_, examples)),) = parts.items()
        if say and len(examples) < self.batch_size:
            rows = f"{len(examples)} row{'s' * (len(examples) > 1)}"
            say(f"{task} {self.split}: has {rows}, fewer than a batch of {self.batch_size}: each batch is of {rows}")
        return Batches(examples, self.batch_size, lengths, shuffle=shuffle, **options)

    def eval_batches(
        self,
        vocabulary: Vocabulary,
        *,
        process_index: int = 0,
        process_count: int = 1,
        say: Say | None = to_stderr,
    ) -> dict[str, Batches]:
        """Returns batches that visit the split once, for each task that has it, by the task's name.

        Args:
          vocabulary, process_index, process_count, say: as in `batches`.

        Raises:
          ValueError: as in `batches`.
        """
        lengths = self.checked_lengths()
        options = {
            "buckets": self.buckets,
            "pad": vocabulary.pad_id,
            "process_index": process_index,
            "process_count": process_count,
        }
        return {
            name: Batches(part.examples, self.batch_size, lengths, shuffle=False, **options)
            for name, part in self._load(vocabulary, to_train=False, say=say).items()
        }

    def checked_lengths(self) -> dict[str, int]:
        """Returns `task_feature_lengths` after checking the fields.

        Raises:
          SettingError: a field is invalid.
        """
        self.check()
        return {name: int(self.task_feature_lengths[name]) for name in ("inputs", "targets")}

    def _request(self, vocabulary: Vocabulary) -> TaskRequest:
        modules = (self.module,) if self.module else ()
        lengths = self.checked_lengths()
        return TaskRequest(
            self.mixture_or_task_name, vocabulary.path, lengths, self.data_dir, modules, vocabulary.eos_id
        )

    def _splits_of(self, dataset: "DatasetConfig | None", vocabulary: Vocabulary) -> list[str]:
        """Returns the name of the dataset's split, if its rows are those of the same task in the same cache, or []."""
        if dataset is None or dataset.source is not None or dataset.tasks is not None:
            return []
        same = dataset.cache_dir == self.cache_dir and dataset._request(vocabulary) == self._request(vocabulary)
        return [split_rows(dataset.split)[0]] if same else []

    def load(
        self,
        vocabulary: Vocabulary,
        *,
        to_train: bool = False,
        then: "DatasetConfig | None" = None,
        say: Say | None = to_stderr,
    ) -> dict[str, Part]:
        """Returns the tokenised rows of each task that has the split, by the task's name.

        Args:
          vocabulary: the tokenizer.
          to_train: whether to leave out tasks with rate 0.
          then, say: as in `batches`.

        Raises:
          ValueError: as in `batches`.
        """
        if self.tasks is not None:
            loaded = {name: one.load(vocabulary, to_train=to_train, say=say) for name, one in self.tasks.items()}
            for name, parts in loaded.items():
                if len(parts) > 1:
                    raise SettingError(
                        f"{name} is a mixture of {', '.join(parts)}, expected one task by each name: set ",
                        Setting("mixture_or_task_name"),
                    )
            examples = {name: next(iter(parts.values())).examples for name, parts in loaded.items()}
            return {name: Part(float(len(one)), one) for name, one in examples.items()}
        if self.source is None:
            request, next_splits = self._request(vocabulary), self._splits_of(then, vocabulary)
            return load_tasks(request, self.split, self.cache_dir, to_train=to_train, then=next_splits, say=say)
        if self.module:
            raise SettingError(
                Setting("mixture_or_task_module"), f" is {self.module!r}, but the rows are those of ",
                f"{type(self.source).__name__}, not of a SeqIO task: leave it out",
            )  # fmt: skip
        name, rows = split_rows(self.split)
        if name not in self.source.splits:
            raise no_split_error(self.mixture_or_task_name, name, self.source.splits)
        postprocess, metrics = scoring(self.source.labels, self.source.metrics)
        texts = self.source.rows(name)[rows]
        if not texts:
            raise empty_split_error(self.mixture_or_task_name, self.split)
        if say and isinstance(self.source, TaskFiles):
            for line in self.source.remarks(name, texts):
                say(line)
        examples = tokenize_rows(texts, vocabulary, postprocess, metrics, quiet=say is None)
        return {self.mixture_or_task_name: Part(1.0, examples)}

    def _load(
        self, vocabulary: Vocabulary, to_train: bool, say: Say | None, then: "DatasetConfig | None" = None
    ) -> dict[str, Part]:
        lengths = self.checked_lengths()
        parts = self.load(vocabulary, to_train=to_train, then=then, say=say)
        for task, (_, examples) in parts.items():
            check_something_left(*examples.longest_and_shortest(), lengths)
            truncated = check_trimmed_labels(answers(examples.postprocess) or (), vocabulary, lengths)
            counts = {name: count for name, count in examples.count_truncated(lengths).items() if count}
            if counts and say:
                what = " and ".join(f"{name} of {count}" for name, count in counts.items())
                lead = (f"{task} {self.split}: ", Setting("task_feature_lengths"), f" {lengths}")
                say(message_text(*lead, f" truncate {what} of {len(examples)} examples"))
            if say:
                for line in [
                    *([truncated_labels_warning(truncated)] if truncated else []),
                    *data_check_lines(examples, vocabulary),
                ]:
                    say(f"{task} {self.split}: {line}")
        return parts


def data_check_lines(examples: Examples, vocabulary: Vocabulary) -> Iterator[str]:
    """Yields the lines that `DataCheck` has about the rows of a split, or about a sample of them."""
    check, parts = DataCheck(vocabulary), blocks(len(examples))
    rows = [examples.rows[part] for part in parts]
    texts = iter(examples.target_texts(np.concatenate(rows)))
    for part in rows:
        check.add(examples.inputs.part(part), examples.targets.part(part), [*itertools.islice(texts, len(part))])
    sampled = f"; they are a sample of {len(examples):,}" if check.rows < len(examples) else ""
    yield from (line + sampled for line in check.lines())


def shared_inputs(train: PlannedBatches, evaluated: Mapping[str, Batches]) -> Iterator[str]:
    """Yields a line per task whose evaluation rows include inputs that are also in the training rows.

    Streamed training data is not checked. If a split has more than `MOST_INPUTS` rows, a sample of it is checked.
    """
    if isinstance(train, MixedBatches):
        trained = [part.examples for part in train.parts.values()]
    else:
        trained = [train.examples] if isinstance(train, Batches) else []
    known = {one for examples in trained for one in input_hashes(examples)}
    for name, batches in evaluated.items():
        own = input_hashes(batches.examples)
        if both := sum(one in known for one in own):
            sampled = len(own) < len(batches.examples) or any(len(one) > MOST_INPUTS for one in trained)
            yield f"{name}: {shared_inputs_warning(both, len(own), at_least=sampled)}"


def input_hashes(examples: Examples) -> list[int]:
    """Returns a hash of the inputs of each row, or of each row in a sample of at most `MOST_INPUTS` rows."""
    parts = (examples.rows[part] for part in blocks(len(examples), MOST_INPUTS))
    return [one for part in parts for one in row_hashes(examples.inputs.part(part))]


def fingerprint_of(tasks: Mapping[str, Batches]) -> str:
    """Returns a hash of the data in the result of `DatasetConfig.eval_batches`, as 16 hexadecimal digits."""
    return hash_of([batches.fingerprint() for batches in tasks.values()])

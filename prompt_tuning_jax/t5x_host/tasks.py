"""This project's SeqIO tasks with the vocabulary of T5X's model (t5x/utils.py, `DatasetConfig`)."""

import dataclasses
import importlib

import seqio

from prompt_tuning_jax.batches.build import find_task
from prompt_tuning_jax.batches.cache import TaskRequest
from prompt_tuning_jax.t5x_host.macros import named_by_macros
from prompt_tuning_jax.tasks import sources
from prompt_tuning_jax.tokenizers.vocabulary import BYTES


@named_by_macros()
def with_vocabulary(
    mixture_or_task_name: str, vocabulary: seqio.Vocabulary, module: str | None = None,
    data_dir: str | None = None,
) -> str:  # fmt: skip
    """The name for `DatasetConfig.mixture_or_task_name`, whose task from now on uses `vocabulary`.

    T5X reads tasks by name and refuses one whose vocabulary is not the model's. A task of this project names the public
    one of T5 1.1, which not every machine can read. A mixture's tasks keep their own.

    Args:
      module: MIXTURE_OR_TASK_MODULE, imported first.
      data_dir: the benchmark's own files; None for TFDS.

    Raises:
      ValueError: no such task, with near misses; or no such module.
    """
    sources.set_data_dir(data_dir)
    if module:
        importlib.import_module(module)
    if mixture_or_task_name not in seqio.MixtureRegistry.names():
        path = getattr(vocabulary, "sentencepiece_model_file", getattr(vocabulary, "path", BYTES))
        modules = (module,) if module else ()
        task = find_task(TaskRequest(mixture_or_task_name, path, {}, modules=modules))
        features = {
            name: dataclasses.replace(feature, vocabulary=vocabulary) for name, feature in task.output_features.items()
        }
        seqio.TaskRegistry.remove(task.name)
        seqio.TaskRegistry.add_provider(task.name, task.replace(output_features=features))
    return mixture_or_task_name

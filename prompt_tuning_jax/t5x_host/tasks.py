"""Gives this project's SeqIO tasks the vocabulary of T5X's model (t5x/utils.py, `DatasetConfig`)."""

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
    """Registers the task again with `vocabulary`, and returns its name for `DatasetConfig.mixture_or_task_name`.

    T5X reads tasks by name, and refuses a task whose vocabulary is not the model's. A task of this project has the
    public vocabulary of T5 1.1, which not every machine can read. The tasks of a mixture keep their vocabularies.

    Args:
      module: MIXTURE_OR_TASK_MODULE, which is imported first.
      data_dir: folder of the benchmark's own files; None for TFDS.

    Raises:
      ValueError: there is no such task (the message has near misses), or no such module.
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

"""Finds registered tasks and mixtures by name, importing only the module of that name, and sets their vocabulary."""

import dataclasses
import importlib
import inspect
from collections.abc import Sequence

import seqio

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.tasks import TASK_MODULES, module_for
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary


def find(name: str, modules: Sequence[str] = ()) -> seqio.Task | seqio.Mixture:
    """Returns the registered task or mixture with this name.

    Args:
      name: the task's or mixture's name.
      modules: the user's own modules, which are imported in addition to this project's module for the name.

    Raises:
      ValueError: there is no such task (the message has near misses), or no such module.
    """
    for module in filter(None, (module_for(name), *modules)):
        import_module(module)
    if name not in names():
        raise SettingError(f"no task {name!r}; {_near_tasks(name)} Set ", Setting("mixture_or_task_name"))
    return seqio.get_mixture_or_task(name)


def names() -> set[str]:
    """Returns the names of the tasks and mixtures that are registered so far."""
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def with_vocabulary(task: seqio.Task, path: str, eos_id: int | None = None) -> seqio.Task:
    """Returns the task with the tokenizer at `path` as its vocabulary, and `eos_id` as its end of sequence."""
    features = {
        # Features that are numbers and not text keep their vocabulary.
        name: feature
        if isinstance(feature.vocabulary, seqio.PassThroughVocabulary)
        else dataclasses.replace(feature, vocabulary=seqio_vocabulary(path, eos_id))
        for name, feature in task.output_features.items()
    }
    return seqio.Task(
        task.name,
        source=task.source,
        preprocessors=task.preprocessors,
        output_features=features,
        postprocess_fn=task.postprocessor,
        metric_fns=task.metric_fns,
    )


def makes_lengths(task: seqio.Task) -> bool:
    """Returns whether a preprocessor needs the lengths to make its examples; SeqIO's own ones only truncate to them."""
    own = (step for step in task.preprocessors if not getattr(step, "__module__", "").startswith("seqio."))
    return any("sequence_length" in inspect.signature(step).parameters for step in own)


def import_module(module: str) -> None:
    """Imports a module, which registers its tasks.

    Raises:
      ValueError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or " "):
            raise
        raise SettingError(
            f"no module {module}: set ", Setting("mixture_or_task_module"), " to one that Python finds"
        ) from None


def _near_tasks(name: str) -> str:
    """Returns a sentence with the names nearest to `name` among all tasks and mixtures."""
    for module in TASK_MODULES:
        import_module(module)
    otherwise = f"there are {len(names())}, and python -m prompt_tuning_jax.tasks lists them."
    return near_misses(name, names(), shown=repr, otherwise=otherwise)

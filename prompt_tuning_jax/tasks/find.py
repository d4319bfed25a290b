"""Finds registered tasks and mixtures by name, importing the module of the name alone, and gives them a vocabulary."""

import dataclasses
import importlib
import inspect
from collections.abc import Sequence

import seqio

from prompt_tuning_jax.errors import Setting, SettingError, near_misses
from prompt_tuning_jax.tasks import TASK_MODULES, module_for
from prompt_tuning_jax.tasks.seqio_tokenizer import seqio_vocabulary


def find(name: str, modules: Sequence[str] = ()) -> seqio.Task | seqio.Mixture:
    """The registered task or mixture.

    Args:
      modules: of the user's own, imported beside the module of the name.

    Raises:
      ValueError: no such task, with near misses; or no such module.
    """
    for module in filter(None, (module_for(name), *modules)):
        import_module(module)
    if name not in names():
        raise SettingError(f"no task {name!r}; {_near_tasks(name)} Set ", Setting("mixture_or_task_name"))
    return seqio.get_mixture_or_task(name)


def names() -> set[str]:
    """Of the tasks and mixtures registered so far."""
    return {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}


def with_vocabulary(task: seqio.Task, path: str, eos_id: int | None = None) -> seqio.Task:
    """The task with the tokenizer at `path` in place of its own vocabulary, and `eos_id` in place of its end."""
    features = {
        # Numbers that are no text pass through as they are.
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
    """Whether a preprocessor makes examples of the given lengths; SeqIO's own ones only cut to them."""
    own = (step for step in task.preprocessors if not getattr(step, "__module__", "").startswith("seqio."))
    return any("sequence_length" in inspect.signature(step).parameters for step in own)


def import_module(module: str) -> None:
    """Registers a module's tasks.

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
    """Which tasks and mixtures of this project, and of modules that are imported, have nearly that name."""
    for module in TASK_MODULES:
        import_module(module)
    otherwise = f"there are {len(names())}, and python -m prompt_tuning_jax.tasks lists them."
    return near_misses(name, names(), shown=repr, otherwise=otherwise)

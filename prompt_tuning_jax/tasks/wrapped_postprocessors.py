"""Defines postprocessors that call another postprocessor, given by name so that a cache can store it."""

from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks import postprocessors

SENTINEL = "<extra_id_0>"  # as `Vocabulary.decode` writes it


def after_sentinel(
    text: str,
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
    *,
    postprocess: str,
    translate: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Calls `postprocess` on an answer after removing the sentinel at its start, if it has one.

    Args:
      text, example, is_target: as for any postprocessor.
      postprocess: the name of a function of `postprocessors`.
      translate: maps answers with the sentinel to answers without it. Only `postprocessors.answers` reads it.
      options: the keyword arguments of `postprocess`.
    """
    del translate
    text = text.removeprefix(SENTINEL).lstrip()
    return getattr(postprocessors, postprocess)(text, example=example, is_target=is_target, **options)


def of_choices(
    text: str, example: Mapping[str, Any], is_target: bool = False, *, postprocess: str, **options: Any
) -> Any:
    """Calls `postprocess` on a generated answer of an example that holds all choices (`every_choice(together=True)`).

    The target is the correct choice.

    Args:
      text, example, is_target: as for any postprocessor.
      postprocess: the name of a function of `postprocessors`.
      options: the keyword arguments of `postprocess`.
    """
    choices: Sequence = example["targets_pretokenized"]
    answer = choices[[*map(bool, example["is_correct"])].index(True)]
    answer = answer.decode() if isinstance(answer, bytes) else answer
    one = dict(example) | {
        "targets_pretokenized": answer,
        "inputs_pretokenized": example["inputs_pretokenized"][0],
    }
    return getattr(postprocessors, postprocess)(
        answer if is_target else text, example=one, is_target=is_target, **options
    )

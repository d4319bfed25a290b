"""Postprocessors around another one, which a cache can name with its options. Plain Python."""

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
    """What `postprocess` makes of an answer behind a sentinel; one without the sentinel is read as it is.

    Args:
      postprocess: the name of a function of `postprocessors`.
      translate: the answers with their sentinel and without, for `postprocessors.answers`; not needed here.
      options: its own.
    """
    del translate
    text = text.removeprefix(SENTINEL).lstrip()
    return getattr(postprocessors, postprocess)(text, example=example, is_target=is_target, **options)


def of_choices(
    text: str, example: Mapping[str, Any], is_target: bool = False, *, postprocess: str, **options: Any
) -> Any:
    """What `postprocess` makes of a generated answer where the example holds all choices (`together`).

    Its target is the right choice.

    Args:
      postprocess: the name of a function of `postprocessors`.
      options: its own.
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

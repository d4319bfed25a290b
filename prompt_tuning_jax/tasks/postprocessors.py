"""Turns decoded text into the values that metrics compare, with plain Python.

Each postprocessor is called as `(text, example=fields, is_target=...)`, with the fields that the cache keeps of the
example. The functions are at the top level of this module, so a cache can store their names.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

UNLABELLED = "<unk>"  # T5's target for an example without a label, as in a benchmark's test split
# Words that `wsc` ignores when it compares referents (T5 `wsc_simple`).
DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose your".split()
)


def label_index(
    text: str,
    example: Mapping[str, Any] | None = None,
    *,
    labels: Sequence[str],
    translate: Mapping[str, str] | None = None,
    **_,
) -> int:
    """Returns the index of `text` in `labels`, or -1 if it is not a label (T5 `string_label_to_class_id`).

    Args:
      text: the answer.
      labels: the labels, in order.
      translate: maps other answers to labels, {"equivalent": "duplicate", ...}: the labels of the task that a prompt
        was trained on, or labels after a sentinel. The labels themselves are accepted, too.
    """
    del example
    text = (translate or {}).get(text, text)
    return labels.index(text) if text in labels else -1


def number(text: str, **_) -> float:
    """Returns a similarity score, or -1 if `text` is not a finite number (T5 `string_to_float`; STS-B)."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if isfinite(value) else -1.0


def multirc(text: str, example: Mapping[str, Any], *, labels: Sequence[str], **_) -> dict[str, Any]:
    """Returns the label of one answer, and its question as the group (T5 `multirc`)."""
    # The paragraph is needed too: SuperGLUE numbers questions over the whole split, but MultiRC's own files number them
    # within a paragraph.
    question = (example.get("idx/paragraph"), example["idx/question"])
    return {"group": question, "value": label_index(text, labels=labels)}


def record(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> dict[str, Any]:
    """Returns an answer, or all answers of a target, and their query as the group (T5 `record`)."""
    value = list(example["answers"]) if is_target else text
    return {"group": (example["idx/passage"], example["idx/query"]), "value": value}


def qa(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> str | list[str]:
    """Returns an answer, or all answers of a target (T5 `qa`)."""
    return list(example["answers"]) if is_target else text


def wsc(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> int:
    """Returns 1 if a generated referent is the candidate, 0 if not, and -1 if it is empty (T5 `wsc_simple`).

    The two match if all words of one, without determiners and ignoring case, are words of the other, and if both or
    neither have an apostrophe: "Bob" is not "Bob's hat". The target is 1 if the candidate is the true referent.
    """
    if is_target:
        return int(example["label"])
    found, candidate = (
        {word for word in referent.lower().split() if word not in DETERMINERS}
        for referent in (text, example["targets_pretokenized"])
    )
    if not found:
        return -1
    if any("'" in word for word in found) != any("'" in word for word in candidate):
        return 0
    return int(found <= candidate or bool(candidate) and candidate <= found)


def text(text: str, **_) -> str:
    """Returns the text unchanged."""
    return text


def answers(postprocess: Callable) -> tuple[str, ...] | None:
    """Returns the closed set of answers that a task's postprocessor accepts, in the order of its labels, or None.

    If the postprocessor has `translate`, these are the answers that it translates into the labels, because a model that
    was trained on the other task gives those.

    Args:
      postprocess: a `functools.partial` of a postprocessor with its `labels`; for any other function the result is
        None.
    """
    options = getattr(postprocess, "keywords", {})
    if "labels" not in options:
        return None
    trained = {label: answer for answer, label in (options.get("translate") or {}).items()}
    return tuple(trained.get(label, label) for label in options["labels"])


def is_no_label(value: Any) -> bool:
    """Returns whether a postprocessor's value means that the text had no valid label, number or referent."""
    if isinstance(value, Mapping):
        value = value["value"]
    return not isinstance(value, (str, list)) and value == -1

"""From decoded text to what a metric compares. Plain Python, so that a cache can name them.

Each is called `(text, example=fields, is_target=...)`, with what the cache keeps of the example.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

UNLABELLED = "<unk>"  # T5's target of an example without a label, as in a benchmark's test split
# Words that `wsc` leaves out of a referent (T5 `wsc_simple`).
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
    """The place of `text` among `labels`, or -1 where it is none of them (T5 `string_label_to_class_id`).

    Args:
      translate: answers in other words than the labels: those of the task that a prompt was trained on, or with a
        sentinel in front, {"equivalent": "duplicate", ...}. The labels themselves are still understood.
    """
    del example
    text = (translate or {}).get(text, text)
    return labels.index(text) if text in labels else -1


def number(text: str, **_) -> float:
    """A similarity score, or -1 where `text` is no finite number (T5 `string_to_float`; STS-B)."""
    try:
        value = float(text)
    except ValueError:
        return -1.0
    return value if isfinite(value) else -1.0


def multirc(text: str, example: Mapping[str, Any], *, labels: Sequence[str], **_) -> dict[str, Any]:
    """The judgement of one answer, and the question it belongs to (T5 `multirc`)."""
    # With its paragraph: SuperGLUE numbers questions through the whole split, MultiRC's own files within a paragraph.
    question = (example.get("idx/paragraph"), example["idx/question"])
    return {"group": question, "value": label_index(text, labels=labels)}


def record(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> dict[str, Any]:
    """An answer, or all answers of a target, and the query they belong to (T5 `record`)."""
    value = list(example["answers"]) if is_target else text
    return {"group": (example["idx/passage"], example["idx/query"]), "value": value}


def qa(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> str | list[str]:
    """An answer, or all answers of a target (T5 `qa`)."""
    return list(example["answers"]) if is_target else text


def wsc(text: str, example: Mapping[str, Any], is_target: bool = False, **_) -> int:
    """Whether a generated referent is the candidate, 1 or 0, or -1 where it is empty (T5 `wsc_simple`).

    It is where, determiners and case left out, the words of one are among those of the other and either both or
    neither has an apostrophe: "Bob" is not "Bob's hat". The label is 1 where the candidate is the true referent.
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
    """The text as it is."""
    return text


def answers(postprocess: Callable) -> tuple[str, ...] | None:
    """The closed set of answers that a task's postprocessor understands, in the order of its labels.

    Where it translates, the answers are those translated: what a model that was trained on the other task says.

    Args:
      postprocess: `functools.partial` of a postprocessor with its `labels`; of any other the answers are None.
    """
    options = getattr(postprocess, "keywords", {})
    if "labels" not in options:
        return None
    trained = {label: answer for answer, label in (options.get("translate") or {}).items()}
    return tuple(trained.get(label, label) for label in options["labels"])


def is_no_label(value: Any) -> bool:
    """Whether a postprocessor found no label, number or referent in an answer, or a target has none."""
    if isinstance(value, Mapping):
        value = value["value"]
    return not isinstance(value, (str, list)) and value == -1

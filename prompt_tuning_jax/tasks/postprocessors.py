"""From decoded text to what a metric compares. Plain Python, so that a cache can name them."""

from collections.abc import Sequence
from typing import Any


def label_index(text: str, example: dict[str, Any] | None = None, *, labels: Sequence[str], **_) -> int:
    """The place of `text` among `labels`, or -1 where it is none of them (T5 `string_label_to_class_id`)."""
    del example
    return labels.index(text) if text in labels else -1

"""Compiles the programs for rows like the given examples, before the first request arrives."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from prompt_tuning_jax.errors import prefixed
from prompt_tuning_jax.inference.predictor import Predictor, label_size, table_size
from prompt_tuning_jax.inference.requests import RANK, Request


def warm_up(predictor: Predictor, rows: Iterable[Any]) -> int:
    """Answers one batch per combination of batch size, method, input length, prompt length and label table size.

    Args:
      rows: examples of the rows that are expected. The prompts that they name are ignored: every prompt length of the
        bank is used.

    Returns:
      The number of batches.

    Raises:
      ValueError: a row is invalid.
    """
    kinds: dict[tuple[str, int], Request] = {}
    labels: dict[tuple[int, int], Request] = {}
    for number, row in enumerate(rows):
        try:
            request = predictor.request({**row, "prompt": None} if isinstance(row, Mapping) else row)
        except ValueError as error:
            raise prefixed(f"row {number + 1} to warm up with: ", error) from None
        kinds.setdefault((request.method, predictor.bucket(request)), request)
        if request.choices is not None:
            labels.setdefault(table_size(*label_size(request)), request)
    stored = {name: predictor.bank.find(name) for name in (None, *predictor.bank)}
    prompts = {(prompt.layer_prompts is not None, prompt.padded): name for name, prompt in stored.items()}
    batches = 0
    for (method, _), request in kinds.items():
        others = labels.values() if method == RANK else (request,)
        for other, prompt in itertools.product(others, prompts.values()):
            request_with_prompt = request._replace(prompt=prompt, labels=other.labels, choices=other.choices)
            for size in sizes(predictor.batch_size):
                predictor.answer([request_with_prompt] * size)
                batches += 1
    return batches


def sizes(batch_size: int) -> list[int]:
    """Returns the batch sizes that programs are compiled for: powers of two below `batch_size`, and `batch_size`."""
    return [*(1 << n for n in range((batch_size - 1).bit_length())), batch_size]

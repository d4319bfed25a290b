"""Measures how similar prompts are, by cosine.

SPoT (Vu et al. 2022, section 3) uses a prompt as the embedding of its task, and measures how similar two tasks are by
the cosine of their prompts' mean vectors.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

Prompt = Float[np.ndarray, "P D"]

BLOCK = 4_096  # rows that are cast to float32 at a time: XXL's whole table would be another 526 MB


def cosines(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "n m"]:
    """Returns the cosine of each row of `a` and each row of `b`; 0 if one of the two is zero."""
    unit = np.concatenate(list(unit_blocks(a)))
    return np.concatenate([unit @ block.T for block in unit_blocks(b)], axis=1)


def mean_vector_similarity(a: Prompt, b: Float[np.ndarray, "Q D"]) -> float:
    """Returns the cosine of two prompts' mean vectors."""
    return float(cosines(a.mean(axis=0, keepdims=True), b.mean(axis=0, keepdims=True))[0, 0])


def best_match_similarity(a: Prompt, b: Float[np.ndarray, "Q D"]) -> float:
    """Returns the mean cosine of a position and its most similar position in the other prompt.

    It is the average of two means: over the positions of `a`, and over those of `b`.
    """
    found = cosines(a, b)
    return float(found.max(axis=1).mean() + found.max(axis=0).mean()) / 2


def unit_blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the rows in blocks, in float32 and each divided by its norm; a row of zeros stays zero."""
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float32)
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
        yield block

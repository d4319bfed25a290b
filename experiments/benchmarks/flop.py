"""Computes the FLOP of a training step's matmuls, and measures how fast a device computes such matmuls."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from experiments.benchmarks.contenders import timed
from prompt_tuning_jax.t5.config import T5Config

SQUARE = {"cpu": 2048}  # the side length of the large matmul, by platform
LARGE_SQUARE = 8192
REPEATS = 7


class Shape(NamedTuple):
    """Holds the shape of a step's batch and prompt.

    Attributes:
      batch: the number of rows, B.
      inputs: the number of input positions, T.
      targets: the number of target positions, U.
      prompt: the number of prompt positions, P; 0 without a prompt.
    """

    batch: int
    inputs: int
    targets: int
    prompt: int


def step_flop(config: T5Config, shape: Shape, *, trains_model: bool) -> int:
    """Returns the floating-point operations of one step's matmuls, two for each multiplication and its addition.

    With S = P + T, J = heads * head_dim and n feed-forward branches (2 in T5 1.1), the forward matmuls of a row have
    these numbers of multiplications:

        encoder layer   4 S D J (query, key, value, out)   + 2 S S J (scores, mix)   + (n + 1) S D F
        decoder layer   4 U D J                            + 2 U U J                 + (n + 1) U D F
                        2 U D J (query, out) + 2 S D J (key, value) + 2 U S J (scores, mix) of the cross-attention
        logits          U D V

    In the backward pass, a matmul with weights needs another matmul of its size for the gradient of its input, and one
    more for the gradient of its weights if they are trained. A matmul of two activations needs two. Prompt tuning
    trains no weights, and values that do not depend on the prompt need no gradient. In the first decoder layer these
    are the self-attention and the query of the cross-attention, whose scores then need a gradient only for the keys.
    """
    _, inputs, targets, prompt = shape
    encoded = prompt + inputs
    wide = config.num_heads * config.head_dim
    square = config.emb_dim * wide  # parameters of one attention matrix
    feed_forward = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim

    attended = config.num_encoder_layers * 2 * encoded * encoded * wide
    weighed = config.num_encoder_layers * encoded * (4 * square + feed_forward)
    attended += config.num_decoder_layers * 2 * targets * (targets + encoded) * wide
    weighed += config.num_decoder_layers * (targets * (6 * square + feed_forward) + encoded * 2 * square)
    weighed += targets * config.emb_dim * config.vocab_size

    backward = weighed + 2 * attended
    if trains_model:
        backward += weighed
    else:
        backward -= targets * 4 * square + 4 * targets * targets * wide  # self-attention of the first decoder layer
        backward -= targets * square + targets * encoded * wide  # the query of its cross-attention
    return 2 * shape.batch * (weighed + attended + backward)


def matmul_shapes(config: T5Config, shape: Shape, platform: str) -> list[tuple[int, int, int]]:
    """Returns (rows, inner, columns) of the matmuls to measure: a large square one, and both of the encoder's MLP."""
    side, positions = SQUARE.get(platform, LARGE_SQUARE), shape.batch * (shape.prompt + shape.inputs)
    return [
        (side, side, side),
        (positions, config.emb_dim, config.mlp_dim),
        (positions, config.mlp_dim, config.emb_dim),
    ]


def matmul_rates(
    make: Callable[[tuple[int, int, int], str], Callable[[], object]],
    shapes: list[tuple[int, int, int]],
    dtypes: list[str],
) -> dict[str, float]:
    """Returns the median FLOP per second of each matmul in each dtype, by names such as "float32 2048x2048x2048".

    Args:
      make: returns, for (rows, inner, columns) and a dtype, a function that computes the matmul and waits for it.
      shapes: the matmuls, as (rows, inner, columns).
      dtypes: the names of the dtypes.
    """
    rates = {}
    for dtype in dtypes:
        for rows, inner, columns in shapes:
            matmul = make((rows, inner, columns), dtype)
            matmul()  # compiled and warm
            seconds = statistics.median(timed(matmul) for _ in range(REPEATS))
            rates[f"{dtype} {rows}x{inner}x{columns}"] = 2 * rows * inner * columns / seconds
    return rates

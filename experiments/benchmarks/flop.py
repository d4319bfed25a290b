"""The arithmetic of a training step's matrix products, and the rate at which a device can do such products."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from experiments.benchmarks.contenders import timed
from prompt_tuning_jax.t5.config import T5Config

SQUARE = {"cpu": 2048}  # the side of the large product, by platform
LARGE_SQUARE = 8192
REPEATS = 7


class Shape(NamedTuple):
    """What a step computes on.

    Attributes:
      batch: rows, B.
      inputs: input positions, T.
      targets: target positions, U.
      prompt: prompt positions, P; 0 without one.
    """

    batch: int
    inputs: int
    targets: int
    prompt: int


def step_flop(config: T5Config, shape: Shape, *, trains_model: bool) -> int:
    """Floating-point operations of one step's matrix products: two for each multiplication and its addition.

    With S = P + T, J = heads * head_dim and n feed-forward branches (2 in T5 1.1), the forward products of a row are

        encoder layer   4 S D J (query, key, value, out)   + 2 S S J (scores, mix)   + (n + 1) S D F
        decoder layer   4 U D J                            + 2 U U J                 + (n + 1) U D F
                        2 U D J (query, out) + 2 S D J (key, value) + 2 U S J (scores, mix) of the cross-attention
        logits          U D V

    Backward, a product with weights has one more product of its size for the gradient of its input, and another for
    that of its weights where these are trained; a product of two activations has two. Prompt tuning trains no weights,
    and what does not depend on the prompt has no gradient: of the first decoder layer, the self-attention and the query
    of the cross-attention, whose scores then have a gradient for the keys alone.
    """
    _, inputs, targets, prompt = shape
    encoded = prompt + inputs
    wide = config.num_heads * config.head_dim
    square = config.emb_dim * wide  # of one attention matrix
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
        backward -= targets * square + targets * encoded * wide  # its query of the encoder's output
    return 2 * shape.batch * (weighed + attended + backward)


def product_shapes(config: T5Config, shape: Shape, platform: str) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the products to measure: a large square one, and both of the encoder's feed-forward."""
    side, positions = SQUARE.get(platform, LARGE_SQUARE), shape.batch * (shape.prompt + shape.inputs)
    return [
        (side, side, side),
        (positions, config.emb_dim, config.mlp_dim),
        (positions, config.mlp_dim, config.emb_dim),
    ]


def product_rates(
    make: Callable[[tuple[int, int, int], str], Callable[[], object]],
    shapes: list[tuple[int, int, int]],
    dtypes: list[str],
) -> dict[str, float]:
    """FLOP per second of each product in each dtype, the median of several; its name is "float32 2048x2048x2048".

    Args:
      make: from a product's (rows, inner, columns) and dtype to what computes it, and returns when that is done.
    """
    rates = {}
    for dtype in dtypes:
        for rows, inner, columns in shapes:
            product = make((rows, inner, columns), dtype)
            product()  # compiled and warm
            seconds = statistics.median(timed(product) for _ in range(REPEATS))
            rates[f"{dtype} {rows}x{inner}x{columns}"] = 2 * rows * inner * columns / seconds
    return rates

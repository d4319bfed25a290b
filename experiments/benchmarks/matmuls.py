"""Measures how fast a device computes the matmuls of a training step."""

import statistics
from collections.abc import Callable

from experiments.benchmarks.contenders import timed
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.training.flop import StepShape

SQUARE = {"cpu": 2048}  # the side length of the large matmul, by platform
LARGE_SQUARE = 8192
REPEATS = 7


def matmul_shapes(config: T5Config, shape: StepShape, platform: str) -> list[tuple[int, int, int]]:
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

"""Estimates the cost of a SuperGLUE task: chip-hours for the paper's 30,000 steps, from the FLOP of a step.

    python -m experiments.costs [--share=0.4] [--price=1.20]

The batch size is 32, with 512 input and 16 target tokens, and P=100. No TPU was available for measurements, so a TPU
chip is assumed to reach `--share` of its bfloat16 peak. The H100's column is measured
(experiments/results/gpu_h100.json), with 8 target tokens. With `--price`, the price of a chip-hour, costs are printed
instead of hours. The costs of evaluation, every 1,000 steps, are not included.
"""

import argparse
import json
from pathlib import Path

from experiments.sizes import SIZES
from prompt_tuning_jax.training.flop import PEAKS, StepShape, step_flop

STEPS, SHAPE = 30_000, StepShape(32, 512, 16, 100)
CHIPS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
H100 = Path(__file__).parent / "results" / "gpu_h100.json"


def chip_hours(size: str, chip: str, share: float) -> float:
    """Returns the chip-hours of one task, which are the hours times the number of chips."""
    return STEPS * step_flop(SIZES[size], SHAPE, trains_model=False) / (share * PEAKS[CHIPS[chip]]) / 3600


def measured_hours() -> dict[str, float]:
    """Returns the hours of one task on one H100, by size, from the measured examples per second."""
    runs = [
        record
        for record in json.loads(H100.read_text())
        if record.get("attention") == "cudnn" and "contenders" in record
    ]
    rates = {record["size"]: record["contenders"]["ours"]["examples_per_second"] for record in runs}
    return {size: STEPS * SHAPE.batch / rate / 3600 for size, rate in rates.items()}


def table(share: float, price: float | None = None) -> str:
    """Returns a Markdown table with one row per size and one column per chip."""
    rows, measured = (
        [f"| | {' | '.join(CHIPS)} | H100, measured |", "|---|" + "---|" * (len(CHIPS) + 1)],
        measured_hours(),
    )
    for size in ("small", "base", "large", "xl", "xxl"):
        hours = [chip_hours(size, chip, share) for chip in CHIPS] + [measured.get(size)]
        cells = ["" if value is None else f"{value * (price or 1):.2f}" for value in hours]
        rows.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.4, help="of a chip's peak that a step reaches")
    parser.add_argument("--price", type=float, help="of a chip-hour")
    args = parser.parse_args()
    print(table(args.share, args.price))


if __name__ == "__main__":
    main()

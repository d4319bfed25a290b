"""Reproduces the ladder's figures and tables (experiments/results/ladder.md) from base models that lie ready.

    python -m experiments.ladder --sizes=pico,nano,micro --gin.DATA_DIR="'path/to/data'" [--gin.NAME=VALUE ...]

It runs the sweeps below one after the other, then `python -m experiments.answers --results=runs`, which predicts the
rows of their trials again for the intervals, and then `python -m experiments.figures --results=runs`. The other
arguments are given to every sweep: `--gin.LM_BASE` says where the base models are, if not in runs/. A sweep skips its
finished trials, so after an interruption the same command goes on.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

# In this order: the last two evaluate what the first has trained.
SWEEPS = ("figure_1", "methods", "figure_3a", "figure_3b", "figure_3c", "figure_3d", "table_1_transfer", "table_3")


def commands(sizes: Sequence[str], arguments: Sequence[str]) -> list[list[str]]:
    """Returns the command lines, in order.

    Args:
      sizes: the sizes of the base models.
      arguments: further arguments of every sweep.
    """
    sweep = [sys.executable, "-m", "prompt_tuning_jax.sweep", "--launcher=local", f"--gin.SIZES={[*sizes]}"]
    sweeps = [[*sweep, f"--gin_file=sweeps/{name}_ladder.gin", *arguments] for name in SWEEPS]
    pages = [[sys.executable, "-m", f"experiments.{module}", "--results=runs"] for module in ("answers", "figures")]
    return [*sweeps, *pages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="nano", help="the sizes, separated by commas")
    args, arguments = parser.parse_known_args()
    for command in commands(args.sizes.split(","), arguments):
        code = subprocess.run(command, check=False).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()

"""Draws what prompt tuning is: a model per task on one side, one frozen model with a prompt per row on the other.

    python -m experiments.method_picture [--out=docs/method.png]

Our own drawing of what the paper's figures 1 and 2 explain. Its numbers are those of T5 1.1 XXL and of a prompt of 100
positions.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.drawing import BILLION, COLOURS
from experiments.sizes import PARAMETERS, SIZES

PICTURE = Path(__file__).parents[1] / "docs" / "method.png"
SIZE, LENGTH = "xxl", 100
TASKS = dict(zip("ABC", COLOURS[:3], strict=True))
BATCH = "ABCAB"  # the tasks of a mixed batch's rows
FROZEN, INPUT = "#E8EAED", "#F6F6F6"
DARK = "#222222"


def box(
    axis: Axes, left: float, bottom: float, width: float, height: float, colour: str, text: str, ink: str = DARK
) -> None:
    """Draws a box with a text in its middle."""
    style = "round,pad=0,rounding_size=0.12"
    patch = FancyBboxPatch(
        (left, bottom), width, height, boxstyle=style, facecolor=colour, edgecolor=DARK, linewidth=0.8
    )
    axis.add_patch(patch)
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=14, color=ink)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.4})


def draw_model_tuning(axis: Axes, parameters: str) -> None:
    """Draws a batch and a tuned model for each task."""
    axis.set_title("Model tuning:\na tuned model per task", fontsize=15)
    for index, (task, colour) in enumerate(TASKS.items()):
        bottom = 6.6 - 3.0 * index
        for row in range(2):
            box(axis, 0.1, bottom + 0.05 + 1.15 * row, 2.6, 0.95, INPUT, f"input {task}")
        arrow(axis, (2.9, bottom + 1.1), (3.8, bottom + 1.1))
        box(axis, 4.0, bottom, 5.7, 2.2, colour, f"model {task}\n{parameters}\nparameters", "white")


def draw_prompt_tuning(axis: Axes, parameters: str, trained: str) -> None:
    """Draws one batch whose rows have prompts of different tasks, and one frozen model."""
    axis.set_title("Prompt tuning:\none frozen model, a prompt per row", fontsize=15)
    for row, task in enumerate(BATCH):
        bottom = 7.8 - 1.35 * row
        box(axis, 0.0, bottom, 2.6, 1.0, TASKS[task], f"prompt {task}", "white")
        box(axis, 2.7, bottom, 2.2, 1.0, INPUT, f"input {task}")
    middle = 7.8 - 1.35 * (len(BATCH) - 1) / 2 + 0.5
    arrow(axis, (5.0, middle), (5.7, middle))
    box(axis, 5.9, middle - 3.2, 4.1, 6.4, FROZEN, f"one frozen\nmodel\n\n{parameters}\nparameters,\nonly read")
    axis.text(
        0.0, 1.1, f"Trained: {trained} numbers per prompt,\nby backpropagation.", va="center", fontsize=14, color=DARK
    )


def draw() -> Figure:
    """Returns the picture."""
    parameters = f"{PARAMETERS[SIZE] / BILLION:.0f} billion"
    figure = Figure(figsize=(9.6, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        axis.set(xlim=(-0.1, 10.1), ylim=(0.4, 9))
        axis.set_axis_off()
    draw_model_tuning(left, parameters)
    draw_prompt_tuning(right, parameters, f"{LENGTH * SIZES[SIZE].emb_dim:,}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    draw().savefig(parser.parse_args().out, dpi=120)


if __name__ == "__main__":
    main()

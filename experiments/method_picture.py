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


def box(axis: Axes, left: float, bottom: float, width: float, height: float, colour: str, text: str = "", **more):
    """Draws a box with a text in its middle."""
    axis.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=DARK,
            linewidth=0.8,
        )
    )  # fmt: skip
    style = {"fontsize": 11, "color": DARK} | more
    axis.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", **style)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "linewidth": 1.2})


def draw_model_tuning(axis: Axes, parameters: str) -> None:
    """Draws a batch and a tuned model for each task."""
    axis.set_title("Model tuning: a tuned model per task", fontsize=13)
    for at, (task, colour) in enumerate(TASKS.items()):
        bottom = 6.6 - 3.0 * at
        for row in range(2):
            box(axis, 0.2, bottom + 0.15 + 1.05 * row, 3.0, 0.85, INPUT, f"input of task {task}", fontsize=10)
        arrow(axis, (3.4, bottom + 1.1), (4.3, bottom + 1.1))
        box(axis, 4.5, bottom, 5.2, 2.2, colour, f"model {task}\n{parameters} parameters", color="white", fontsize=12)


def draw_prompt_tuning(axis: Axes, parameters: str, trained: str) -> None:
    """Draws one batch whose rows have prompts of different tasks, and one frozen model."""
    axis.set_title("Prompt tuning: one frozen model, a prompt per row", fontsize=13)
    for row, task in enumerate(BATCH):
        bottom = 7.75 - 1.35 * row
        box(axis, 0.0, bottom, 1.9, 1.0, TASKS[task], f"prompt {task}", color="white")
        box(axis, 2.0, bottom, 2.7, 1.0, INPUT, f"input of task {task}", fontsize=10)
    middle = 7.75 - 1.35 * (len(BATCH) - 1) / 2 + 0.5
    arrow(axis, (4.8, middle), (5.5, middle))
    box(
        axis,
        5.7,
        middle - 3.2,
        4.2,
        6.4,
        FROZEN,
        f"one frozen model\n\n{parameters} parameters,\nonly read",
        fontsize=12,
    )
    note = f"Trained: each prompt's {trained} numbers, by backpropagation\nthrough the frozen model."
    axis.text(0.0, 0.75, note, ha="left", va="center", fontsize=11, color=DARK)


def draw() -> Figure:
    """Returns the picture."""
    parameters = f"{PARAMETERS[SIZE] / BILLION:.0f} billion"
    figure = Figure(figsize=(12, 4.6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        axis.set(xlim=(-0.1, 10), ylim=(0, 9))
        axis.set_axis_off()
    draw_model_tuning(left, parameters)
    draw_prompt_tuning(right, parameters, f"{LENGTH * SIZES[SIZE].emb_dim:,}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    draw().savefig(parser.parse_args().out, dpi=110)


if __name__ == "__main__":
    main()

"""Compares methods at each size of the ladder with the prompt tuning and model tuning of figure 1."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.averages import markdown_row
from experiments.claims import INTERVALS, difference, on_shared_tasks
from experiments.drawing import Series, averages_of, draw_panel, our_lines
from experiments.intervals import Interval
from experiments.trials import Result, by_setting

PROMPT, MODEL = "prompt_tuning", "model_tuning"
SERIES = {
    PROMPT: Series("prompt tuning", 0),
    MODEL: Series("model tuning", 1),
    "super_pos": Series("SuperPos", 2),
    "per_layer": Series("per-layer prompts", 3),
}


class Difference(NamedTuple):
    """Holds the difference of two methods at one size, in points.

    Attributes:
      size: the model's size.
      left, right: the methods; the interval is of the left one's score minus the right one's.
      task: the task, or "mean" for the mean over tasks.
    """

    size: str
    left: str
    right: str
    task: str
    interval: Interval


def beside_figure_1(results: Sequence[Result], figure_1: Sequence[Result]) -> list[Result]:
    """Returns the methods' trials, after those of prompt tuning and model tuning in figure 1 on the same tasks."""
    tasks = {result.axes["TASK"] for result in results}
    beside = [one for one in figure_1 if one.axes["METHOD"] in (PROMPT, MODEL) and one.axes["TASK"] in tasks]
    return [*beside, *results]


def differences(results: Sequence[Result]) -> list[Difference]:
    """Returns each method less prompt tuning, and model tuning less each method, by size and for each task."""
    found = []
    for size, methods in by_setting(results, "METHOD").items():
        others = [method for method in methods if method not in (PROMPT, MODEL)]
        for left, right in [*((other, PROMPT) for other in others), *((MODEL, one) for one in (PROMPT, *others))]:
            high, low = on_shared_tasks(methods, left, right)
            if high:
                found.append(Difference(size, left, right, "mean", difference(high, low)))
            for task in high:
                one = difference({task: high[task]}, {task: low[task]})
                found.append(Difference(size, left, right, task, one))
    return found


def draw(name: str, results: Sequence[Result]) -> Figure:
    """Draws the scores of all methods against the number of parameters: the mean over tasks, and each task."""
    panels = our_lines(averages_of(results), "METHOD", SERIES)
    figure = Figure(figsize=(3.0 * len(panels) + 0.5, 3.8), layout="constrained")
    figure.suptitle(f"{name}: methods against model size")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, lines) in zip(axes, panels.items(), strict=True):
        draw_panel(axis, task, lines)
    axes[0].set_ylabel("score on the dev set")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def text(results: Sequence[Result]) -> str:
    """Returns the differences as Markdown."""
    titles = ["size", "compared", "task", "difference"]
    rows = [
        [one.size, f"{label(one.left)} - {label(one.right)}", one.task, str(one.interval)]
        for one in differences(results)
    ]
    table = [markdown_row(titles), markdown_row(["---"] * len(titles)), *map(markdown_row, rows)]
    return "\n".join(["", INTERVALS, "", *table, ""])


def label(method: str) -> str:
    """Returns a method's name in the figure."""
    return SERIES[method].label if method in SERIES else method

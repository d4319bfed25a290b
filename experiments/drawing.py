"""Draws scores against model size: our points with error bars, one panel per task, beside the paper's lines."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments import paper
from experiments.averages import MEAN, Average, Spread, group, mean_over
from experiments.sizes import PARAMETERS
from experiments.trials import Result

# Okabe and Ito's colours, which colour-blind readers can distinguish, without yellow, which is pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"
TASKS_A_ROW = 4
ASIDE = 1.08  # the factor between neighbouring points of the same size, so that they do not overlap
MILLION, BILLION = 10**6, 10**9


class Line(NamedTuple):
    """Holds a line of a panel.

    Attributes:
      label: the line's name in the legend.
      style: the index of the colour and marker; lines that mean the same in two panels have the same style.
      points: scores by number of parameters.
      faded: whether the line is pale, as lines of other authors are.
    """

    label: str
    style: int
    points: Mapping[int, Spread]
    faded: bool = False


class Series(NamedTuple):
    """Holds the label and the style of a value of a figure's axis."""

    label: str
    style: int


def our_lines(averages: Sequence[Average], axis: str, series: Mapping[str, Series]) -> dict[str, list[Line]]:
    """Returns the lines of each panel, by the value of TASK: panels are the mean over tasks, and each task.

    Args:
      averages: averages over seeds, with the axes SIZE, TASK and `axis`.
      axis: the axis whose values are the lines.
      series: labels and styles by the values of `axis`, in the order of the legend. Other values come after them, under
        their own names.
    """
    others = sorted({one.axes[axis] for one in averages} - set(series))
    series = {**series, **{value: Series(value, len(series) + index) for index, value in enumerate(others)}}
    panels: dict[str, dict[str, dict[int, Spread]]] = {}
    for one in averages:
        if one.score is not None:
            lines = panels.setdefault(one.axes["TASK"], {})
            lines.setdefault(one.axes[axis], {})[PARAMETERS[one.axes["SIZE"]]] = one.score
    return {
        panel: [Line(*series[value], lines[value]) for value in series if value in lines]
        for panel, lines in panels.items()
    }


def averages_of(results: Sequence[Result]) -> list[Average]:
    """Returns the averages over seeds of each setting, for the mean over tasks and for each task."""
    return mean_over(results) + group(results)


def paper_line(series: Series, curve: paper.Curve) -> Line:
    """Returns the line of one of the paper's curves."""
    points = {paper.MODELS[size].parameters: point for size, point in zip(paper.SIZES, curve.points, strict=True)}
    return Line(*series, points, faded=True)


def draw_scores(
    title: str,
    ours: Mapping[str, Sequence[Line]],
    theirs: Sequence[Line],
    source: str,
    last: Callable[[Axes], None] | None = None,
) -> Figure:
    """Draws the mean over tasks beside the paper's lines, and below them the tasks, if there are several.

    Args:
      title: the figure's title.
      ours: the result of `our_lines`.
      theirs: the paper's lines.
      source: the source of the paper's lines, for the title of their panel.
      last: draws one more panel, after those of the tasks.
    """
    tasks = [panel for panel in ours if panel != MEAN]
    below = (len(tasks) if len(tasks) > 1 else 0) + (last is not None)
    rows = -(-below // TASKS_A_ROW)
    figure = Figure(figsize=(10, 4.8 + 2.6 * rows), layout="constrained")
    figure.suptitle(title)
    halves = figure.subfigures(2, 1, height_ratios=[4.8, 2.6 * rows], squeeze=False)[:, 0] if rows else [figure]
    left, right = halves[0].subplots(1, 2)
    of = f"mean of {', '.join(tasks)}" if len(tasks) > 1 else ", ".join(tasks)
    draw_panel(left, f"this project, {of}", ours.get(MEAN, ()))
    draw_panel(right, f"the paper, SuperGLUE ({source})", theirs)
    left.set_ylabel("score on the dev set")
    for axis in (left, right):
        put_legend_below(axis)
    if rows:
        small = halves[1].subplots(rows, min(below, TASKS_A_ROW), squeeze=False).ravel()
        for axis, task in zip(small, tasks if len(tasks) > 1 else (), strict=False):
            draw_panel(axis, task, ours[task])
        if last:
            last(small[below - 1])
        for axis in small[below:]:
            axis.set_axis_off()
    return figure


def draw_panel(axis: Axes, title: str, lines: Sequence[Line]) -> None:
    """Draws points with error bars against the number of parameters; if there is only one size, side by side."""
    every = sorted({size for line in lines for size in line.points})
    for index, (label, style, points, faded) in enumerate(lines):
        sizes = sorted(points)
        aside = ASIDE ** (index - (len(lines) - 1) / 2) if len(every) == 1 else 1.0
        # With one seed there is no standard deviation, and NaN draws no bar.
        bars = [np.nan if points[size].std is None else points[size].std for size in sizes]
        colour = COLOURS[style % len(COLOURS)]
        axis.errorbar(
            [size * aside for size in sizes],
            [points[size].mean for size in sizes],
            bars,
            color=colour,
            marker=MARKERS[style % len(MARKERS)],
            markersize=4 if faded else 5,
            linestyle="--" if faded else "-",
            linewidth=1.0 if faded else 1.4,
            alpha=0.6 if faded else 1.0,
            capsize=3,
            label=label,
        )
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.25)
    axis.set_xlabel("parameters", fontsize=8)
    axis.tick_params(labelsize=8)
    if every:
        mark_sizes(axis, every)


def put_legend_below(axis: Axes) -> None:
    """Puts the legend below the panel, where it hides no point."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = min(len(labels), 6 if max(map(len, labels)) < 8 else 2)
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


def mark_sizes(axis: Axes, sizes: Sequence[int]) -> None:
    """Makes the axis logarithmic, with a tick at each named size and at the largest size."""
    axis.set_xscale("log")
    axis.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    ticks = {count: f"{name}\n{short(count)}" for name, count in PARAMETERS.items() if count in sizes}
    ticks.setdefault(sizes[-1], f"\n{short(sizes[-1])}")
    axis.set_xticks([*ticks], [*ticks.values()])
    axis.xaxis.set_minor_locator(NullLocator())


def short(count: int) -> str:
    """Returns a number of parameters in short form, such as "77M" or "11.1B"."""
    return f"{count / BILLION:.3g}B" if count >= BILLION else f"{count / MILLION:.3g}M"

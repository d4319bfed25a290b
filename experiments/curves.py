"""Draws the scores at each evaluated step of a sweep's trials, to show whether the runs were long enough."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.averages import group
from experiments.drawing import COLOURS, MARKERS, Series
from experiments.trials import SIZES, Result, evaluations, name_of, read_summary, read_trials, split_mixtures

STEP = "STEP"  # the axis of the evaluated step
NOT_METRICS = ("step", "split", "seconds")


def read_curves(sweep_dir: Path) -> list[Result]:
    """Returns a result for each evaluation of the sweep's finished training runs, with the axis `STEP`."""
    found = []
    for result in read_trials(sweep_dir)[0]:
        for record in evaluations(sweep_dir / name_of(result.axes)) if result.command == "train" else ():
            metrics = {key: value for key, value in record.items() if key not in NOT_METRICS}
            summary = {"task": result.task, "best": metrics, "best_step": record["step"]}
            found.append(read_summary({**result.axes, STEP: str(record["step"])}, json.dumps(summary)))
    return found


def draw(title: str, results: Sequence[Result], series: dict[str, Series], axis: str = "METHOD") -> Figure:
    """Draws the mean over seeds against the step, with a band of one standard deviation; a panel per task and size.

    Args:
      title: the figure's title.
      results: the results of `read_curves`.
      series: the label and style of each value of `axis`.
      axis: the axis that has a line per value.
    """
    averages = group(split_mixtures(results))
    tasks = list(dict.fromkeys(one.axes["TASK"] for one in averages))
    sizes = sorted({one.axes["SIZE"] for one in averages}, key=SIZES.index)
    figure = Figure(figsize=(3.2 * len(sizes) + 0.6, 2.4 * len(tasks) + 1.0), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(tasks), len(sizes), squeeze=False, sharex=True, sharey="row")
    for row, task in zip(panels, tasks, strict=True):
        for panel, size in zip(row, sizes, strict=True):
            for value, (label, style) in series.items():
                here = {"TASK": task, "SIZE": size, axis: value}
                line = [one for one in averages if one.score and here.items() <= one.axes.items()]
                if line:
                    steps = [int(one.axes[STEP]) for one in line]
                    means = np.array([one.score.mean for one in line if one.score])
                    deviations = np.array([one.score.std or 0.0 for one in line if one.score])
                    colour = COLOURS[style]
                    panel.plot(steps, means, color=colour, marker=MARKERS[style], markersize=4, label=label)
                    panel.fill_between(steps, means - deviations, means + deviations, color=colour, alpha=0.15)
            panel.set_title(f"{task}, {size}", fontsize=9)
            panel.grid(alpha=0.25)
            panel.tick_params(labelsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("step", fontsize=8)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure

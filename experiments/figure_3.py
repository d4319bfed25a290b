"""Draws figure 3: scores by prompt length, prompt initialisation, and pre-training of the base model."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments import paper
from experiments.drawing import Line, Series, averages_of, draw_scores, our_lines, paper_line
from experiments.trials import Result, value_order

INITIALIZERS = {
    "random_uniform": "random uniform",
    "sampled_vocabulary": "sampled vocabulary",
    "class_labels": "class labels",
}
OBJECTIVES = {
    "span": "span corruption",
    "span_sentinel": "span corruption + sentinel",
    "lm": "LM adaptation",
}


class Ablation(NamedTuple):
    """Describes a part of the figure.

    Attributes:
      title: the part's title.
      axis: the sweep's axis, besides SIZE, TASK and RANDOM_SEED.
      curves: the paper's curves, by the values of the axis.
      names: labels by value, if the values are names; empty if they are numbers.
      label: the format of a label for a value that is a number.
      by_rank: whether the n-th smallest value has the same style in both panels, even if the values differ.
    """

    title: str
    axis: str
    curves: Mapping[str, paper.Curve]
    names: Mapping[str, str] = {}
    label: str = ""
    by_rank: bool = False

    def series(self, values: Sequence[str]) -> dict[str, Series]:
        """Returns the labels and styles of the values, in order."""
        if self.names:
            return {value: Series(name, index) for index, (value, name) in enumerate(self.names.items())}
        known = sorted(values if self.by_rank else {*values, *self.curves}, key=value_order)
        return {value: Series(self.label.format(int(value)), index) for index, value in enumerate(known)}


ABLATIONS = {
    "figure_3a": Ablation("prompt length", "PROMPT_LENGTH", paper.FIGURE_3A, label="P={}"),
    "figure_3b": Ablation("prompt initialisation", "INIT", paper.FIGURE_3B, INITIALIZERS),
    "figure_3c": Ablation("pre-training objective", "OBJECTIVE", paper.FIGURE_3C, OBJECTIVES),
    "figure_3d": Ablation("steps of LM adaptation", "LM_STEPS", paper.FIGURE_3D, label="{:,} steps", by_rank=True),
}


def draw(name: str, results: Sequence[Result]) -> Figure:
    """Draws a sweep over SIZE, TASK, RANDOM_SEED and the axis of its ablation."""
    ablation = ABLATIONS[name.removesuffix("_ladder")]
    theirs = ablation.series([*ablation.curves] if ablation.by_rank else values_in(results, ablation.axis))
    curves = [paper_line(theirs[value], curve) for value, curve in ablation.curves.items()]
    return draw_scores(f"{name}: {ablation.title}", lines(ablation, results), curves, "digitised")


def lines(ablation: Ablation, results: Sequence[Result]) -> dict[str, list[Line]]:
    """Returns our own lines, by panel."""
    series = ablation.series(values_in(results, ablation.axis))
    return our_lines(averages_of(results), ablation.axis, series)


def values_in(results: Sequence[Result], axis: str) -> list[str]:
    """Returns the values of an axis, in the order of the results."""
    return list(dict.fromkeys(result.axes[axis] for result in results))

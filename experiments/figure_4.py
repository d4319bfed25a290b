"""Draws figure 4: task-specific parameters as a percentage of the model's, against model size, from exact counts."""

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments import paper
from experiments.drawing import COLOURS, mark_sizes, put_legend_below
from experiments.sizes import PARAMETERS, SIZES

LENGTHS = (1, 5, 20, 100, 150)


class Share(NamedTuple):
    """Holds the task-specific parameters of a method at a size.

    Attributes:
      method, size: the method, and the name of the model's size.
      model_parameters: the number of the model's parameters.
      length: the prompt's length in positions; None for model tuning.
      task_parameters: the number of parameters stored per task; for prompt design, the number of token ids.
      share: `task_parameters` in per cent of `model_parameters`.
    """

    method: str
    size: str
    model_parameters: int
    length: int | None
    task_parameters: int

    @property
    def share(self) -> float:
        return 100 * self.task_parameters / self.model_parameters


def shares(sizes: Iterable[str] = SIZES) -> list[Share]:
    """Returns the shares per size of prompt tuning with each of `LENGTHS`, model tuning, and prompt design."""
    found = []
    for size in sizes:
        width, model = SIZES[size].emb_dim, PARAMETERS[size]
        found += [Share("prompt_tuning", size, model, length, length * width) for length in LENGTHS]
        found.append(Share("model_tuning", size, model, None, model))
        found += [Share("prompt_design", size, model, ids, ids) for ids in paper.PROMPT_DESIGN_IDS]
    return found


def to_csv(found: Iterable[Share]) -> str:
    """Returns a CSV with one row per method, size and length."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Share._fields, "share_percent"])
    writer.writerows([*one, f"{one.share:.6g}"] for one in found)
    return text.getvalue()


def draw(found: Iterable[Share]) -> Figure:
    """Draws the figure with logarithmic axes. Prefix tuning and WARP are shown as the ranges that the paper states."""
    lines: dict[tuple[str, int | None], dict[int, float]] = {}
    for one in found:
        lines.setdefault((one.method, one.length), {})[one.model_parameters] = one.share
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axis = figure.subplots()
    sizes = sorted({size for line in lines.values() for size in line})
    edges = [sizes[0] / 1.6, sizes[-1] * 1.6]
    axis.plot(*_points(lines["model_tuning", None]), "s-", color=COLOURS[1], label="model tuning")
    low, high = paper.PREFIX_TUNING_SHARE
    label = f"prefix tuning (stated: {low:g} to {high:g}% at inference)"
    axis.fill_between(edges, low, high, color=COLOURS[4], alpha=0.35, linewidth=0, label=label)
    limit = paper.WARP_SHARE[1]
    label = f"WARP (stated: below {limit:g}%)"
    axis.plot(edges, [limit, limit], ":", color=COLOURS[3], linewidth=2, label=label)
    for index, length in enumerate(reversed(LENGTHS)):
        style = {"color": COLOURS[0], "alpha": 1 - 0.17 * index, "marker": "os^Dv"[index], "markersize": 5}
        axis.plot(*_points(lines["prompt_tuning", length]), **style, label=f"prompt tuning, length {length}")
    few, many = (lines["prompt_design", ids] for ids in paper.PROMPT_DESIGN_IDS)
    label = "prompt design, {:,} to {:,} token ids (stated)".format(*paper.PROMPT_DESIGN_IDS)
    shares_of = [[line[size] for size in sizes] for line in (few, many)]
    axis.fill_between(sizes, *shares_of, color=COLOURS[6], alpha=0.2, linewidth=0, label=label)
    axis.set_yscale("log")
    axis.set(ylabel="% of the model's parameters", xlabel="parameters of the model")
    axis.set_title("figure_4: the numbers that a task needs of its own")
    mark_sizes(axis, sizes)
    axis.grid(alpha=0.25)
    put_legend_below(axis)
    return figure


def _points(line: dict[int, float]) -> tuple[list[int], list[float]]:
    return [*line], [*line.values()]

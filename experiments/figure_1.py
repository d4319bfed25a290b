"""Draws figure 1: prompt tuning, model tuning, multi-task model tuning and prompt design against model size.

A further panel, which the paper does not have, shows how much of model tuning's gain prompt tuning reaches.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import paper
from experiments.drawing import (
    COLOURS,
    Line,
    Series,
    averages_of,
    draw_scores,
    mark_sizes,
    our_lines,
    paper_line,
)
from experiments.intervals import DRAWS, Interval, mean_draws, mean_of
from experiments.sizes import PARAMETERS
from experiments.trials import Result, by_ranking, by_setting, split_mixtures

BEST_TEXT = "best_text"
SERIES = {
    "prompt_tuning": Series("prompt tuning", 0),
    "model_tuning": Series("model tuning", 1),
    "multi_task": Series("model tuning, multi-task", 2),
    BEST_TEXT: Series("prompt design, ranked, a task's best text", 3),
    "prompt_design": Series("prompt design, ranked, mean of the texts", 4),
}


def draw(name: str, results: Sequence[Result]) -> Figure:
    """Draws a sweep over METHOD, SIZE, TASK and RANDOM_SEED; prompt design has TEXT instead of seeds."""
    theirs = [paper_line(SERIES[method], curve) for method, curve in paper.FIGURE_1.items() if method in SERIES]
    theirs.append(paper_line(Series(f"prompt tuning, {paper.SPOT}", 5), paper.FIGURE_1["prompt_tuning_spot"]))
    design = {size: paper.Spread(score) for size, score in paper.PROMPT_DESIGN.items()}
    theirs.append(Line("prompt design, GPT-3 few-shot", SERIES[BEST_TEXT].style, design, faded=True))
    title = f"{name}: tuning a prompt, the model, or nothing"
    found = shares(results)
    return draw_scores(
        title, lines(results), theirs, "digitised", (lambda axis: draw_shares(axis, found)) if found else None
    )


def shares(results: Sequence[Result]) -> dict[str, Interval]:
    """Returns, by size, how much of model tuning's gain over the base model alone prompt tuning reaches, in per cent.

    This is (prompt tuning - base) / (model tuning - base). Each of the three is the mean score of generated answers
    over the tasks that have all three; the base alone is the mean of prompt design's texts. The interval is the middle
    95% of bootstrap draws over the seeds of each task and method, and over the rows if the answers to them are known.
    Sizes without a gain in every draw are left out.
    """
    rng = np.random.default_rng(0)
    found = {}
    for size, methods in by_setting(results, "METHOD").items():
        all_three = [methods.get(method, {}) for method in ("prompt_design", "prompt_tuning", "model_tuning")]
        tasks = [task for task in all_three[0] if all(task in scores for scores in all_three)]
        if not tasks:
            continue
        design, prompt, model = ({task: scores[task] for task in tasks} for scores in all_three)
        base = mean_of(design)
        of_prompt, of_model = (mean_draws(scores, rng) - base for scores in (prompt, model))
        if of_model.min() > 0:
            share = (mean_of(prompt) - base) / (mean_of(model) - base)
            found[size] = Interval.of(100 * share, 100 * of_prompt / of_model)
    return found


def draw_shares(axis: Axes, found: dict[str, Interval]) -> None:
    """Draws the shares and their intervals against the number of parameters."""
    sizes = [PARAMETERS[size] for size in found]
    means, low, high = np.array([*found.values()]).T
    axis.errorbar(sizes, means, [means - low, high - means], color=COLOURS[0], marker="o", markersize=5, capsize=3)
    axis.axhline(100.0, color=COLOURS[6], linewidth=0.8, linestyle="--")
    axis.set_title("share of model tuning's gain, %", fontsize=9)
    axis.set_ylim(bottom=min(0.0, low.min() - 5))
    axis.grid(alpha=0.25)
    axis.set_xlabel("parameters", fontsize=8)
    axis.tick_params(labelsize=8)
    mark_sizes(axis, sorted(sizes))


def shares_text(results: Sequence[Result]) -> str:
    """Returns the shares as Markdown, or "" if there are none."""
    found = shares(results)
    if not found:
        return ""
    rows = [f"| {size} | {one.mean:.0f} | {one.low:.0f} to {one.high:.0f} |" for size, one in found.items()]
    return "\n".join(
        [
            "",
            "Prompt tuning's share of model tuning's gain over the base model alone, in per cent: "
            "(prompt tuning - base) / (model tuning - base), of means over tasks. The base alone is the mean of prompt "
            "design's texts, by generation. "
            f"The interval is the middle 95% of {DRAWS:,} bootstrap draws over the seeds, and over the rows of "
            "trials whose answers are known.",
            "",
            "| SIZE | share | interval |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def lines(results: Sequence[Result]) -> dict[str, list[Line]]:
    """Returns our own lines, by panel."""
    tuned = [result for result in results if result.axes["METHOD"] != "prompt_design"]
    # GPT-3, whose numbers stand beside these, was scored by ranking.
    designed = [by_ranking(result) for result in results if result.axes["METHOD"] == "prompt_design"]
    # A text takes the place of a seed, so that mean and standard deviation are over texts.
    texts = [
        result._replace(axes={"RANDOM_SEED" if axis == "TEXT" else axis: value for axis, value in result.axes.items()})
        for result in designed
    ]
    return our_lines(averages_of(split_mixtures([*tuned, *best_texts(designed), *texts])), "METHOD", SERIES)


def best_texts(results: Sequence[Result]) -> list[Result]:
    """Returns the result of the best text per size and task, since prompts are designed for their task."""
    best: dict[tuple[str, str], Result] = {}
    for result in results:
        key = result.axes["SIZE"], result.axes["TASK"]
        if key not in best or (result.score or 0.0) > (best[key].score or 0.0):
            best[key] = result
    return [
        result._replace(axes={"METHOD": BEST_TEXT, "SIZE": size, "TASK": task}) for (size, task), result in best.items()
    ]

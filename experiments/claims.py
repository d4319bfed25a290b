"""Tests the paper's claims on the ladder's results: a difference between two settings, with its interval, per size.

`python -m experiments.figures` writes the table to experiments/results/ladder_claims.md.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.averages import markdown_row
from experiments.figure_3 import ABLATIONS
from experiments.intervals import DRAWS, Interval, Scores, mean_draws, mean_of
from experiments.trials import SIZES, Result, by_ranking, by_setting

INTERVALS = (
    "Each row has the difference between two settings in points. A setting's score is the mean over seeds and tasks. "
    f"The brackets hold the middle 95% of {DRAWS:,} bootstrap draws over seeds and rows. In each draw both settings "
    "have the same rows, and the metrics are computed from the answers to these rows in `ladder_answers.csv`."
)
NOTE = f"{INTERVALS} `cannot tell` means that the interval contains 0."


class Claim(NamedTuple):
    """Holds the test of a claim at one size.

    Attributes:
      source: the figure or table of the paper.
      size: the model's size, or two sizes.
      compared: the two settings, "A - B". The paper says that A is higher.
      interval: A's score minus B's, in points.
    """

    source: str
    size: str
    compared: str
    interval: Interval

    @property
    def verdict(self) -> str:
        if not self.interval.excludes_zero:
            return "cannot tell"
        return "as in the paper" if self.interval.low > 0 else "against the paper"


def difference(left: Scores, right: Scores) -> Interval:
    """Returns the mean over tasks of `left` minus that of `right`. Both have the same tasks."""
    rng = np.random.default_rng(0)
    return Interval.of(mean_of(left) - mean_of(right), mean_draws(left, rng) - mean_draws(right, rng))


def on_shared_tasks(settings: Mapping[str, Scores], left: str, right: str) -> tuple[Scores, Scores]:
    """Returns the scores of two settings on the tasks that both have; ({}, {}) if there are none."""
    scores = settings.get(left, {}), settings.get(right, {})
    tasks = [task for task in scores[0] if task in scores[1]]
    return {task: scores[0][task] for task in tasks}, {task: scores[1][task] for task in tasks}


# Pairs of values of an ablation's axis. The paper says that the first is better, at least on small models.
PAIRS = {
    "figure_3a": [("20", "1"), ("20", "5"), ("50", "20")],
    "figure_3b": [("class_labels", "random_uniform"), ("sampled_vocabulary", "random_uniform")],
    "figure_3c": [("lm", "span"), ("lm", "span_sentinel"), ("span_sentinel", "span")],
    "figure_3d": [("1000", "0"), ("1000", "100"), ("1000", "500")],
}


def of_ablation(figure: str, results: Sequence[Result]) -> list[Claim]:
    """Returns the claims of a part of figure 3."""
    found, ablation = [], ABLATIONS[figure]
    for better, worse in PAIRS[figure]:
        labels = ablation.series([better, worse])
        for size, settings in by_setting(results, ablation.axis).items():
            high, low = on_shared_tasks(settings, better, worse)
            if high:
                compared = f"{labels[better].label} - {labels[worse].label}"
                found.append(Claim(figure, size, compared, difference(high, low)))
    return found


def of_figure_1(results: Sequence[Result]) -> list[Claim]:
    """Returns the gap between model tuning and prompt tuning at each size, and the differences of these gaps."""
    found, gaps, rng = [], {}, np.random.default_rng(0)
    for size, methods in by_setting(results, "METHOD").items():
        model, prompt = on_shared_tasks(methods, "model_tuning", "prompt_tuning")
        if not model:
            continue
        found.append(Claim("figure_1", size, "model tuning - prompt tuning", difference(model, prompt)))
        for task in model:
            one = difference({task: model[task]}, {task: prompt[task]})
            found.append(Claim("figure_1", size, f"model tuning - prompt tuning, {task}", one))
        gaps[size] = mean_of(model) - mean_of(prompt), mean_draws(model, rng) - mean_draws(prompt, rng)
    sizes = [*gaps]
    pairs = [*zip(sizes, sizes[1:], strict=False)]
    for small, large in pairs + ([(sizes[0], sizes[-1])] if len(sizes) > 2 else []):
        change = Interval.of(gaps[small][0] - gaps[large][0], gaps[small][1] - gaps[large][1])
        found.append(Claim("figure_1", f"{small}, {large}", "gap of the smaller size - gap of the larger", change))
    return found


def of_table_1(results: Sequence[Result]) -> list[Claim]:
    """Returns by how much prompt tuning is better on a task that it was not tuned on, by generation and by ranking."""
    found = []
    moved = [result for result in results if result.axes["FROM"] != result.axes["TASK"]]
    ranked = [by_ranking(result) for result in moved if result.ranking_score is not None]
    for answers, how in ((moved, ""), (ranked, ", labels ranked")):
        for source in dict.fromkeys(result.axes["FROM"] for result in answers):
            one_way = [result for result in answers if result.axes["FROM"] == source]
            for size, methods in by_setting(one_way, "METHOD").items():
                prompt, model = on_shared_tasks(methods, "prompt_tuning", "model_tuning")
                for task in prompt:
                    one = difference({task: prompt[task]}, {task: model[task]})
                    compared = f"prompt tuning - model tuning, {source} to {task}{how}"
                    found.append(Claim("table_1", size, compared, one))
    return found


def of_table_3(results: Sequence[Result], figure_1: Sequence[Result]) -> list[Claim]:
    """Returns by how much the majority vote of several prompts is better than their average, by generation.

    The prompts are those of figure 1. Draws resample the rows only, because the vote is that of these prompts. So there
    is no claim about trials whose answers are not known.
    """
    found, votes = [], [result for result in results if result.answers]
    prompts = by_setting([result for result in figure_1 if result.answers], "METHOD")
    for size in sorted({result.axes["SIZE"] for result in votes}, key=SIZES.index):
        of_size = {result.axes["TASK"]: [result] for result in votes if result.axes["SIZE"] == size}
        vote, average = on_shared_tasks({"vote": of_size} | prompts.get(size, {}), "vote", "prompt_tuning")
        if vote:
            draws = mean_draws(vote, None) - mean_draws(average, None)
            found.append(Claim("table_3", size, "vote - average", Interval.of(mean_of(vote) - mean_of(average), draws)))
    return found


def claims(results: Mapping[str, Sequence[Result]]) -> list[Claim]:
    """Returns the tests of all claims, from the results of each figure and table that there is."""
    tests = {"figure_1": of_figure_1} | {figure: functools.partial(of_ablation, figure) for figure in PAIRS}
    tests["table_1_transfer"] = of_table_1
    tests["table_3"] = functools.partial(of_table_3, figure_1=results.get("figure_1", ()))
    return [claim for name, test in tests.items() if name in results for claim in test(results[name])]


def page(found: Sequence[Claim]) -> str:
    """Returns the claims as a page in Markdown."""
    titles = ["the paper's", "size", "compared", "difference", "verdict"]
    rows = [[one.source.replace("_", " "), one.size, one.compared, str(one.interval), one.verdict] for one in found]
    table = [markdown_row(titles), markdown_row(["---"] * len(titles)), *map(markdown_row, rows)]
    return "\n".join(["# The paper's claims on the ladder", "", NOTE, "", *table, ""])

"""Draws figure 1: prompt tuning, model tuning, multi-task model tuning and prompt design against model size."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import paper
from experiments.drawing import Line, Series, averages_of, draw_scores, our_lines, paper_line
from experiments.trials import Result, split_mixtures

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
    return draw_scores(title, lines(results), theirs, "digitised")


def lines(results: Sequence[Result]) -> dict[str, list[Line]]:
    """Returns our own lines, by panel."""
    tuned = [result for result in results if result.axes["METHOD"] != "prompt_design"]
    designed = [by_ranking(result) for result in results if result.axes["METHOD"] == "prompt_design"]
    # A text takes the place of a seed, so that mean and standard deviation are over texts.
    texts = [
        result._replace(axes={"RANDOM_SEED" if axis == "TEXT" else axis: value for axis, value in result.axes.items()})
        for result in designed
    ]
    return our_lines(averages_of(split_mixtures([*tuned, *best_texts(designed), *texts])), "METHOD", SERIES)


def by_ranking(result: Result) -> Result:
    """Returns the result with its ranking score, since GPT-3 was scored by ranking; unchanged if it has none."""
    return result if result.ranking_score is None else result._replace(score=result.ranking_score)


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

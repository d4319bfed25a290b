"""Writes the paper's tables: our trials' results, with the printed numbers beside or below them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments import paper
from experiments.averages import MEAN, markdown_row
from experiments.collect import page
from experiments.trials import ENSEMBLE, RANKING, Result, axes_in, by_task
from prompt_tuning_jax.tasks.metrics import task_score

PRINTED = "## The paper's, printed"


def table_1(name: str, results: Sequence[Result]) -> str:
    """Returns table 1: zero-shot transfer from SQuAD to other domains, F1."""
    printed = ["dataset", "model tuning", "prompt tuning", "difference"]
    rows = [
        [dataset, f"{model}", f"{prompt}", f"{prompt.mean - model.mean:+.1f}"]
        for dataset, (model, prompt) in paper.TABLE_1.items()
    ]
    note = "F1, trained on SQuAD, XXL."
    return f"{page(name, results, 'OF_SEED')}\n{PRINTED}\n\n{note}\n\n{_table(printed, rows)}"


def table_2(name: str, results: Sequence[Result]) -> str:
    """Returns table 2: zero-shot transfer between two paraphrase tasks."""
    printed = ["train", "evaluate", "tuning", "accuracy", "F1"]
    rows = [[*row, *(f"{value}" for value in values)] for row, values in paper.TABLE_2.items()]
    return f"{page(name, results, 'OF_SEED')}\n{PRINTED}\n\nXXL.\n\n{_table(printed, rows)}"


def super_glue(name: str, results: Sequence[Result]) -> str:
    """Returns the scores on each task of SuperGLUE, and their mean."""
    printed = ["dataset", "metric", "mean of five prompts"]
    rows = [
        [task, " / ".join(row.metrics), _slashed(row.average)]
        for task, row in [*paper.TABLE_3.items(), ("SuperGLUE", paper.TABLE_3_MEAN)]
    ]
    return f"{page(name, results, over='TASK')}\n{PRINTED}\n\nTable 3, XXL.\n\n{_table(printed, rows)}"


def table_3(name: str, results: Sequence[Result]) -> str:
    """Returns table 3: average, best and majority vote of several prompts, with the paper's numbers for the task."""
    axes = [axis for axis in axes_in(results) if axis != "TASK"]
    rows: list[list[str]] = []
    scores: dict[tuple[str, ...], list[list[float]]] = {}
    for result in results:
        axis_values = [result.axes.get(axis, "") for axis in axes]
        for answered_by, prefix in (("generation", ""), ("ranking", RANKING)):
            found = {column: by_task(result.metrics, f"{prefix}{column} ") for column in ENSEMBLE}
            for task, metrics in found["average"].items():
                name_of_task = task or result.axes.get("TASK", result.task)
                columns = [found[column][task] for column in ENSEMBLE]
                ours = [_slashed([*values.values()]) for values in columns]
                rows.append(
                    [*axis_values, name_of_task, answered_by, " / ".join(metrics), *ours, *_printed(name_of_task)]
                )
                scores.setdefault((*axis_values, answered_by), []).append(
                    [task_score(values) or 0.0 for values in columns]
                )
    for (*axis_values, answered_by), values in scores.items():
        if len(values) > 1:
            means = [f"{value:.1f}" for value in np.mean(values, axis=0)]
            theirs = [_slashed(getattr(paper.TABLE_3_MEAN, column)) for column in ENSEMBLE]
            rows.append([*axis_values, MEAN, answered_by, "score", *means, "8 tasks", *theirs])
    titles = [*axes, "TASK", "answered by", "metric", *ENSEMBLE, "the paper's metric", *ENSEMBLE]
    note = (
        "In per cent. Average is the mean over the prompts, best the prompt of the highest score, ensemble their "
        "majority vote. The paper's are printed, of five prompts on XXL."
    )
    return f"# {name}\n\n{note}\n\n{_table(titles, rows)}"


def _printed(task: str) -> list[str]:
    row = {known.lower(): row for known, row in paper.TABLE_3.items()}.get(task.lower())
    if row is None:
        return [""] * (1 + len(ENSEMBLE))
    return [" / ".join(row.metrics), *(_slashed(getattr(row, column)) for column in ENSEMBLE)]


def _slashed(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [markdown_row(titles), markdown_row(["---"] * len(titles)), *map(markdown_row, rows)]
    return "\n".join(lines) + "\n"


TABLES: Mapping[str, Callable[[str, Sequence[Result]], str]] = {
    "table_1_transfer": table_1,
    "table_2_transfer": table_2,
    "table_3": table_3,
    "super_glue": super_glue,
}

"""Figures are drawn from CSVs alone, show what is in them, and stand beside the paper's numbers."""

import csv
import dataclasses
import itertools
import json
import math
import statistics
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes

from experiments import claims, curves, figure_1, figure_3, figure_4, figures, method_sizes, paper, tables
from experiments.sizes import LADDER, PARAMETERS, SIZES, number_of_parameters
from experiments.trials import Result, to_csv
from prompt_tuning_jax.checkpoints.base import EMBEDDED, expected_shapes
from prompt_tuning_jax.checkpoints.huggingface import read_config
from prompt_tuning_jax.t5.config import T5Config

TASKS = ("cb", "sst2")
SEEDS = ("0", "1", "2")
DRAWN = ("nano", "micro")
VALUES = {
    "figure_3a_ladder": ("PROMPT_LENGTH", ("1", "5", "20", "50")),
    "figure_3b_ladder": ("INIT", ("random_uniform", "sampled_vocabulary", "class_labels")),
    "figure_3c_ladder": ("OBJECTIVE", ("span", "span_sentinel", "lm")),
    "figure_3d_ladder": ("LM_STEPS", ("0", "100", "500", "1000")),
}


def result(score: float, ranking: float | None = None, metrics: dict | None = None, **axes: str) -> Result:
    task = f"taskless_{axes.get('TASK', 'all')}_v200"
    return Result(axes, "train", task, score, ranking, metrics or {"accuracy": score}, 50, 200, 1.5, 6400, "f00d")


def sweep(axis: str, values: tuple[str, ...], seed: int = 0) -> list[Result]:
    rng = np.random.default_rng(seed)
    points = itertools.product(values, DRAWN, TASKS, SEEDS)
    return [
        result(float(rng.uniform(40, 80)), **{axis: value, "SIZE": size, "TASK": task, "RANDOM_SEED": seed})
        for value, size, task, seed in points
    ]


def first_figure() -> list[Result]:
    """Each of the methods, as figure_1's sweeps have them."""
    rng = np.random.default_rng(1)
    results = sweep("METHOD", ("prompt_tuning", "model_tuning"))
    for size, seed in itertools.product(DRAWN, SEEDS):
        scores = [float(value) for value in rng.uniform(60, 80, len(TASKS))]
        metrics = {f"{task}_v200/accuracy": score for task, score in zip(TASKS, scores, strict=True)}
        metrics["other_v200/accuracy"] = 1.0
        results.append(
            result(statistics.mean(scores), metrics=metrics, METHOD="multi_task", SIZE=size, RANDOM_SEED=seed)
        )
    for size, task, text in itertools.product(DRAWN, TASKS, ("plain", "question")):
        ranking = float(rng.uniform(30, 60))
        results.append(result(0.0, ranking, METHOD="prompt_design", SIZE=size, TASK=task, TEXT=text))
    return results


def by_definition(results: list[Result], size: str, tasks: tuple[str, ...], **axes: str) -> tuple[float, float]:
    """The mean over seeds of each one's mean over tasks, and the sample standard deviation."""
    of_seeds = []
    for seed in SEEDS:
        wanted = axes | {"SIZE": size, "RANDOM_SEED": seed}
        scores = [one.score for task in tasks for one in results if one.axes == wanted | {"TASK": task}]
        assert len(scores) == len(tasks)
        of_seeds.append(sum(scores) / len(scores))
    return statistics.mean(of_seeds), statistics.stdev(of_seeds)


def drawn(axis: Axes) -> dict[str, dict[float, tuple[float, float | None]]]:
    """What an axis shows, read off it: by label, by number of parameters the height and half of the error bar."""
    found = {}
    for container in axis.containers:
        line, _, (bars,) = container.lines
        # A segment is its two ends, or empty where there is no bar.
        halves = [(ends[1][1] - ends[0][1]) / 2 if len(ends) else None for ends in bars.get_segments()]
        places = zip(line.get_xdata(), line.get_ydata(), halves, strict=True)
        found[container.get_label()] = {float(x): (float(y), half) for x, y, half in places}
    return found


def axes_by_title(figure) -> dict[str, Axes]:
    return {axis.get_title().split(",")[0]: axis for axis in figure.get_axes()}


@pytest.fixture
def redraw(monkeypatch):
    """The command in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
        figures.main()

    return run


def tied(config: T5Config) -> T5Config:
    return dataclasses.replace(config, logits_via_embedding=True, mlp_activations=("relu",), head_dim=24)


@pytest.mark.parametrize("config", [*(SIZES[size] for size in (*LADDER, "small")), tied(SIZES["nano"])])
def test_the_number_of_parameters_is_the_networks(config):
    assert number_of_parameters(config) == sum(math.prod(shape) for shape in expected_shapes(config).values())


def test_the_number_of_parameters_is_the_papers():
    assert {size: PARAMETERS[size] for size in paper.SIZES} == {
        size: model.parameters for size, model in paper.MODELS.items()
    }


def test_the_embedded_base_is_nano():
    assert PARAMETERS["nano"] == number_of_parameters(read_config(EMBEDDED["nano"])) == 3_705_728


def test_figure_4_is_the_papers_table(tmp_path, redraw, capsys):
    redraw(f"--out={tmp_path}")
    with open(tmp_path / "figure_4.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "prompt_tuning" and row["length"] == "100"]
    table = {row["size"]: row for row in rows if row["size"] in paper.MODELS}
    assert list(table) == list(paper.SIZES)
    for size, model in paper.MODELS.items():
        row = table[size]
        assert int(row["model_parameters"]) == model.parameters
        assert int(row["task_parameters"]) == model.prompt_parameters
        assert f"{float(row['share_percent']):.4f}" == model.share
    assert (tmp_path / "figure_4.png").stat().st_size > 10_000
    assert "absent from" in capsys.readouterr().out


def test_figure_4_draws_every_share():
    (axis,) = figure_4.draw(figure_4.shares()).get_axes()
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert axis.get_xscale() == axis.get_yscale() == "log"
    sizes = [*PARAMETERS.values()]
    for length in (1, 5, 20, 100, 150):
        line = lines[f"prompt tuning, length {length}"]
        assert list(line.get_xdata()) == sizes
        widths = {"pico": 64, "nano": 128, "micro": 256, "mini": 384} | {
            size: m.d_model for size, m in paper.MODELS.items()
        }
        assert list(line.get_ydata()) == [100 * length * widths[size] / count for size, count in PARAMETERS.items()]
    assert list(lines["model tuning"].get_ydata()) == [100] * len(sizes)
    # Figure 2: a prompt of five positions before the largest.
    assert [s.task_parameters for s in figure_4.shares(["xxl"]) if s.length == 5] == [20_480]


@pytest.mark.parametrize("name", VALUES)
def test_an_ablation_shows_means_and_deviations(name):
    axis, values = VALUES[name]
    results = sweep(axis, values)
    panels = axes_by_title(figure_3.draw(name, results))
    ablation = figure_3.ABLATIONS[name.removesuffix("_ladder")]
    labels = {value: series.label for value, series in ablation.series(list(values)).items() if value in values}
    assert panels.keys() == {"this project", "the paper", *TASKS}
    for panel, tasks in {"this project": TASKS, "cb": ("cb",), "sst2": ("sst2",)}.items():
        found = drawn(panels[panel])
        assert list(found) == [labels[value] for value in values]
        for value in values:
            expected = {PARAMETERS[size]: by_definition(results, size, tasks, **{axis: value}) for size in DRAWN}
            for size, point in found[labels[value]].items():
                # An error bar is two ends about a mean, each rounded.
                assert point == pytest.approx(expected[size], abs=1e-9)
            assert found[labels[value]].keys() == expected.keys()
    theirs = drawn(panels["the paper"])
    assert [[y for y, _ in line.values()] for line in theirs.values()] == [
        [point.mean for point in curve.points] for curve in ablation.curves.values()
    ]
    assert all(list(line) == [model.parameters for model in paper.MODELS.values()] for line in theirs.values())


def test_figure_1_shows_each_method():
    results = first_figure()
    panels = axes_by_title(figure_1.draw("figure_1_ladder", results))
    labels = {method: series.label for method, series in figure_1.SERIES.items()}
    found = {panel: drawn(axis) for panel, axis in panels.items()}
    assert list(found["this project"]) == [*labels.values()]
    for method, size in itertools.product(("prompt_tuning", "model_tuning"), DRAWN):
        point = found["this project"][labels[method]][PARAMETERS[size]]
        assert point == pytest.approx(by_definition(results, size, TASKS, METHOD=method), abs=1e-9)
    for size in DRAWN:
        runs = [one for one in results if one.axes["METHOD"] == "multi_task" and one.axes["SIZE"] == size]
        # What only the mixture has takes no part: the score of the fixture's runs is without it.
        point = found["this project"][labels["multi_task"]][PARAMETERS[size]]
        scores = [one.score for one in runs]
        assert point == pytest.approx((statistics.mean(scores), statistics.stdev(scores)), abs=1e-9)
        cb = [one.metrics["cb_v200/accuracy"] for one in runs]
        assert found["cb"][labels["multi_task"]][PARAMETERS[size]][0] == pytest.approx(statistics.mean(cb), abs=1e-9)
        ranked = {
            (one.axes["TASK"], one.axes["TEXT"]): one.ranking_score
            for one in results
            if one.axes["METHOD"] == "prompt_design" and one.axes["SIZE"] == size
        }
        best = [max(ranked[task, text] for text in ("plain", "question")) for task in TASKS]
        height, bar = found["this project"][labels[figure_1.BEST_TEXT]][PARAMETERS[size]]
        assert height == pytest.approx(statistics.mean(best), abs=1e-9) and bar is None
        texts = [statistics.mean(ranked[task, text] for task in TASKS) for text in ("plain", "question")]
        point = found["this project"][labels["prompt_design"]][PARAMETERS[size]]
        assert point == pytest.approx((statistics.mean(texts), statistics.stdev(texts)), abs=1e-9)
    theirs = found["the paper"]
    assert theirs["prompt tuning"][11_135_332_352] == (90.0, None)
    assert theirs["model tuning"][76_961_152] == pytest.approx((62.8, 0.8), abs=1e-9)
    assert len(theirs["prompt design, GPT-3 few-shot"]) == 8
    assert "digitised" in panels["the paper"].get_title()


def test_the_share_of_model_tunings_gain():
    """Against its definition, on scores whose interval can be enumerated: two seeds each, and a base of 10."""
    scores = {"prompt_tuning": (30.0, 50.0), "model_tuning": (50.0, 70.0), "prompt_design": (0.0, 20.0)}
    results = [
        result(score, METHOD=method, SIZE="nano", TASK="boolq", **{axis: str(index)})
        for method, of_method in scores.items()
        for axis in ["TEXT" if method == "prompt_design" else "RANDOM_SEED"]
        for index, score in enumerate(of_method)
    ]
    found = figure_1.shares([*results, result(90.0, METHOD="prompt_tuning", SIZE="nano", TASK="sst2", RANDOM_SEED="0")])
    prompt, model = (
        [sum(pair) / 2 - 10.0 for pair in itertools.product(scores[method], repeat=2)]
        for method in ("prompt_tuning", "model_tuning")
    )
    every = [100 * one / other for one, other in itertools.product(prompt, model)]
    low, high = np.percentile(every, [2.5, 97.5], method="inverted_cdf")
    assert found == {"nano": pytest.approx((100 * 30 / 50, low, high), abs=1e-9)}
    panel = axes_by_title(figure_1.draw("figure_1_ladder", results))["share of model tuning's gain"]
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([60.0])
    assert "| nano | 60 | 33 to 100 |" in figure_1.shares_text(results)

    worse = [one if one.axes["METHOD"] != "model_tuning" else one._replace(score=5.0) for one in results]
    assert figure_1.shares(worse) == {} and figure_1.shares_text(worse) == ""


def test_curves_are_the_scores_at_each_evaluated_step(tmp_path, redraw):
    """From metrics.jsonl: means over the seeds, and a mixture's tasks beside the same tasks alone."""
    runs, scores = tmp_path / "runs", {}
    for method, seed in itertools.product(("prompt_tuning", "multi_task"), (0, 1)):
        alone = method == "prompt_tuning"
        axes = {"METHOD": method, "SIZE": "nano"} | ({"TASK": "cb"} if alone else {}) | {"RANDOM_SEED": str(seed)}
        folder = runs / "figure_1_ladder" / ",".join(f"{axis}={value}" for axis, value in axes.items())
        folder.mkdir(parents=True)
        name = "accuracy" if alone else "ladder_cb/accuracy"
        task = "taskless_cb" if alone else "ladder_mixture"
        lines = [{"step": 50, "split": "train", "loss": 1.0, "seconds": 1.0}]
        for step, score in ((100, 40.0 + seed), (200, 50.0 + 3 * seed)):
            lines.append({"step": step, "split": "eval", name: score, "seconds": 2.0})
            scores.setdefault((method, step), []).append(score)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "summary.json").write_text(json.dumps({"task": task, "best": {name: 50.0}, "best_step": 200}))
    redraw(f"--results={runs}", f"--out={tmp_path / 'out'}")
    results = figures.read(tmp_path / "out" / "figure_1_ladder_curves.csv")
    assert len(results) == 8 and (tmp_path / "out" / "figure_1_ladder_curves.png").stat().st_size > 10_000
    panel = axes_by_title(curves.draw("", results, figure_1.SERIES))["cb"]
    found = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in panel.lines}
    assert found.keys() == {figure_1.SERIES[method].label for method in ("prompt_tuning", "multi_task")}
    for method in ("prompt_tuning", "multi_task"):
        steps, means = found[figure_1.SERIES[method].label]
        assert list(steps) == [100, 200]
        assert list(means) == pytest.approx([statistics.mean(scores[method, step]) for step in (100, 200)])


def seeds_of(scores: dict[str, list[float]], **axes: str) -> list[Result]:
    return [
        result(score, TASK=task, **axes, RANDOM_SEED=str(seed))
        for task, of_task in scores.items()
        for seed, score in enumerate(of_task)
    ]


def test_a_difference_of_trials_without_answers_has_the_interval_of_its_seeds():
    """Against the normal distribution: the variances of the seeds, over their number."""
    left, right = {"sst2": [70.0, 74.0, 75.0], "cb": [50.0, 54.0]}, {"sst2": [60.0], "cb": [40.0, 44.0, 51.0]}
    found = claims.difference(*({task: seeds_of({task: side[task]}) for task in side} for side in (left, right)))
    assert found.mean == pytest.approx((73 + 52) / 2 - (60 + 45) / 2, abs=1e-9)
    variance = sum(statistics.pvariance(scores) / len(scores) / 4 for side in (left, right) for scores in side.values())
    half = 1.96 * math.sqrt(variance)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)  # means of so few seeds are not quite normal
    assert (found.high + found.low) / 2 == pytest.approx(found.mean, abs=0.1 * half)


def test_tasks_and_sizes_that_lack_a_setting_take_no_part_in_a_claim():
    results = [
        *seeds_of({"sst2": [70.0], "cb": [0.0]}, SIZE="nano", METHOD="model_tuning"),
        *seeds_of({"sst2": [60.0], "imdb": [0.0]}, SIZE="nano", METHOD="prompt_tuning"),
        *seeds_of({"sst2": [60.0]}, SIZE="pico", METHOD="prompt_tuning"),
    ]
    found = claims.claims({"figure_1": results})
    assert {(one.size, one.compared): one.interval.mean for one in found} == {
        ("nano", "model tuning - prompt tuning"): pytest.approx(10.0),
        ("nano", "model tuning - prompt tuning, sst2"): pytest.approx(10.0),
    }


def test_claims_are_judged_by_their_interval():
    scores = {"pico": {"1": 50.0, "5": 50.0, "20": 75.0, "50": 40.0}, "nano": {"1": 60.0, "20": 60.5}}
    results = [
        one
        for size, of_size in scores.items()
        for length, score in of_size.items()
        for one in seeds_of({"sst2": [score - 1, score, score + 1]}, SIZE=size, PROMPT_LENGTH=length)
    ]
    found = {(one.size, one.compared): one for one in claims.claims({"figure_3a": results})}
    assert {key: one.verdict for key, one in found.items()} == {
        ("pico", "P=20 - P=1"): "as in the paper",
        ("nano", "P=20 - P=1"): "cannot tell",
        ("pico", "P=20 - P=5"): "as in the paper",
        ("pico", "P=50 - P=20"): "against the paper",
    }
    page = claims.page([*found.values()])
    assert f"| figure 3a | pico | P=20 - P=1 | {found['pico', 'P=20 - P=1'].interval} | as in the paper |" in page
    assert "25.0 [" in page


def around(score: float) -> list[float]:
    return [score + step for step in (-4, -1, 0, 2, 3)]


def test_the_gap_to_model_tuning_is_compared_between_sizes():
    results = [
        one
        for size, (prompt, model) in {"pico": (20.0, 70.0), "nano": (60.0, 72.0), "micro": (74.0, 74.0)}.items()
        for method, score in {"prompt_tuning": prompt, "model_tuning": model}.items()
        for one in seeds_of({"sst2": around(score), "cb": around(score - 10)}, SIZE=size, METHOD=method)
    ]
    found = {(one.size, one.compared): one.interval for one in claims.claims({"figure_1": results})}
    gap = "gap of the smaller size - gap of the larger"
    means = {key: one.mean for key, one in found.items()}
    assert means["pico", "model tuning - prompt tuning"] == pytest.approx(50.0)
    assert means["nano", "model tuning - prompt tuning, cb"] == pytest.approx(12.0)
    assert means["pico, nano", gap] == pytest.approx(38.0)
    assert means["nano, micro", gap] == pytest.approx(12.0)
    assert means["pico, micro", gap] == pytest.approx(50.0)
    # Both gaps' variances add up.
    halves = {key: (one.high - one.low) / 2 for key, one in found.items()}
    both = math.hypot(*(halves[size, "model tuning - prompt tuning"] for size in ("pico", "micro")))
    assert halves["pico, micro", gap] == pytest.approx(both, rel=0.03)


def test_methods_are_compared_at_each_size_with_prompt_and_model_tuning(tmp_path, redraw):
    """Those two are trials of figure 1, on the methods' tasks. A size without them has no differences."""
    scores = {"prompt_tuning": 60.0, "model_tuning": 80.0, "multi_task": 10.0}
    both = [one for method in scores for one in seeds_of({"cb": [scores[method]]}, SIZE="nano", METHOD=method)]
    both += seeds_of({"sst2": [70.0], "imdb": [50.0]}, SIZE="nano", METHOD="prompt_tuning")
    super_pos = seeds_of({"sst2": [74.0, 78.0], "cb": [70.0, 72.0]}, SIZE="nano", METHOD="super_pos")
    alone = seeds_of({"cb": [50.0]}, SIZE="pico", METHOD="per_layer")
    (tmp_path / "figure_1_ladder.csv").write_text(to_csv(both))
    (tmp_path / "methods_ladder.csv").write_text(to_csv([*super_pos, *alone]))
    redraw(f"--out={tmp_path}")
    results = method_sizes.beside_figure_1([*super_pos, *alone], both)
    found = {(one.size, one.left, one.right, one.task): one.interval for one in method_sizes.differences(results)}
    assert {key: one.mean for key, one in found.items()} == {
        ("nano", "super_pos", "prompt_tuning", "mean"): pytest.approx((76 + 71 - 70 - 60) / 2),
        ("nano", "super_pos", "prompt_tuning", "cb"): pytest.approx(11.0),
        ("nano", "super_pos", "prompt_tuning", "sst2"): pytest.approx(6.0),
        ("nano", "model_tuning", "prompt_tuning", "mean"): pytest.approx(20.0),  # the tasks that both have
        ("nano", "model_tuning", "prompt_tuning", "cb"): pytest.approx(20.0),
        ("nano", "model_tuning", "super_pos", "mean"): pytest.approx(9.0),
        ("nano", "model_tuning", "super_pos", "cb"): pytest.approx(9.0),
    }
    text = (tmp_path / "methods_ladder.md").read_text()
    sst2 = found["nano", "super_pos", "prompt_tuning", "sst2"]
    assert f"| nano | SuperPos - prompt tuning | sst2 | {sst2} |" in text
    assert "multi_task" not in text and "imdb" not in text
    assert "| mean | nano | super_pos | 2 | 73.5 ± 2.1 |" in text  # a mean that needs no IMDB
    assert (tmp_path / "methods_ladder.png").stat().st_size > 10_000
    lines = drawn(axes_by_title(method_sizes.draw("methods_ladder", results))["cb"])
    assert lines == {
        "prompt tuning": {PARAMETERS["nano"]: (60.0, None)},
        "model tuning": {PARAMETERS["nano"]: (80.0, None)},
        "SuperPos": {PARAMETERS["nano"]: pytest.approx((71.0, math.sqrt(2)))},
        "per-layer prompts": {PARAMETERS["pico"]: (50.0, None)},
    }


def test_transfers_are_compared():
    moved = [
        one
        for method, score in {"prompt_tuning": 80.0, "model_tuning": 60.0}.items()
        for one in seeds_of({"imdb": [score] * 3, "sst2": [50.0]}, SIZE="nano", METHOD=method, FROM="sst2")
    ]
    moved = [one._replace(ranking_score=70.0) for one in moved]
    transfer, ranked = claims.claims({"table_1_transfer": moved})
    assert (transfer.compared, transfer.verdict) == (
        "prompt tuning - model tuning, sst2 to imdb",
        "as in the paper",
    )
    assert transfer.interval.mean == pytest.approx(20.0)
    assert (ranked.compared, ranked.interval.mean) == (f"{transfer.compared}, labels ranked", pytest.approx(0.0))


def test_everything_is_redrawn_from_the_csvs(tmp_path, redraw, capsys):
    sweeps = {name: sweep(*VALUES[name]) for name in VALUES} | {"figure_1_ladder": first_figure()}
    for name, results in sweeps.items():
        (tmp_path / f"{name}.csv").write_text(to_csv(results))
    redraw(f"--out={tmp_path}")
    said = capsys.readouterr()
    for name in (*sweeps, "figure_4"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert str(tmp_path / f"{name}.png") in said.out
    for name, results in sweeps.items():
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}\n")
        assert f"{name}.md: {len(results)} trials" in said.out
    assert "figure_1, figure_3a" in said.out.splitlines()[-1] and "figure_1_ladder" not in said.out.splitlines()[-1]


def test_a_mean_that_lacks_tasks_is_said(tmp_path, redraw, capsys):
    results = [
        one
        for one in sweep("INIT", ("class_labels",))
        if one.axes["TASK"] == "cb" or (one.axes["RANDOM_SEED"] == "0" and one.axes["SIZE"] == "nano")
    ]
    (tmp_path / "figure_3b.csv").write_text(to_csv(results))
    redraw(f"--out={tmp_path}")
    said = capsys.readouterr().err
    assert "SIZE nano, TASK mean: 1 of 3 are whole, missing sst2" in said
    assert "SIZE micro, TASK mean: 0 of 3 are whole, missing sst2" in said
    found = drawn(axes_by_title(figure_3.draw("figure_3b", results))["this project"])["class labels"]
    assert list(found) == [PARAMETERS["nano"]] and found[PARAMETERS["nano"]][1] is None


def test_sweeps_are_collected_first(tmp_path, redraw, capsys):
    runs = tmp_path / "runs"
    for seed, score in enumerate((60.0, 62.0)):
        folder = runs / "figure_3c_ladder" / f"SIZE=nano,TASK=cb,OBJECTIVE=lm,RANDOM_SEED={seed}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(f'{{"task": "cb", "best": {{"accuracy": {score}}}}}')
    (runs / "figure_3c_ladder" / "SIZE=nano,TASK=cb,OBJECTIVE=lm,RANDOM_SEED=2").mkdir()
    (runs / "figure_3d" / "logs").mkdir(parents=True)
    redraw(f"--results={runs}", f"--out={tmp_path / 'out'}")
    said = capsys.readouterr()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"figure_3c_ladder.{kind}" for kind in ("csv", "md", "png")),
        *(f"figure_4.{kind}" for kind in ("csv", "png")),
        "ladder_claims.md",
    }
    assert "RANDOM_SEED=2: not finished" in said.err and f"no trial in {runs / 'figure_3d'}" in said.err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("SIZE,score\nnano,1\n", ["figure_3a.csv", "expected the columns"]),
        (to_csv([result(1.0, SIZE="nano", TASK="cb")]), ["without PROMPT_LENGTH"]),
        (to_csv([result(1.0, SIZE="nanno", TASK="cb", PROMPT_LENGTH="1")]), ["SIZE nanno", "nano"]),
        (to_csv([result(1.0, SIZE="nano", TASK="cb")]).splitlines()[0], ["no trials"]),
    ],
)
def test_a_csv_that_is_not_the_figures_is_one_line(tmp_path, redraw, capsys, text, parts):
    (tmp_path / "figure_3a.csv").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        redraw(f"--out={tmp_path}")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in parts), said


def test_table_3_sets_the_papers_row_beside_ours():
    def votes(task: str, shift: float) -> Result:
        columns = {"average": 50.0, "best": 54.0, "ensemble": 52.0}
        found = {
            f"{column} {metric}": value + shift + more
            for column, value in columns.items()
            for metric, more in (("accuracy", 0.0), ("f1", 1.0))
        }
        return result(0.0, metrics=found, SIZE="nano", TASK=task)

    lines = tables.table_3("table_3_ladder", [votes("cb", 0.0), votes("mrpc", 10.0)]).splitlines()
    ours = "| nano | cb | generation | accuracy / f1 | 50.0 / 51.0 | 54.0 / 55.0 | 52.0 / 53.0 |"
    assert f"{ours} acc / F1 | 99.3 / 99.0 | 100.0 / 100.0 | 100.0 / 100.0 |" in lines
    assert "| nano | mrpc | generation | accuracy / f1 | 60.0 / 61.0 | 64.0 / 65.0 | 62.0 / 63.0 |  |  |  |  |" in lines
    assert "| nano | mean | generation | score | 55.5 | 59.5 | 57.5 | 8 tasks | 90.5 | 91.0 | 91.3 |" in lines


def test_the_tables_copied_from_the_paper_agree_with_themselves():
    """Its table 3's mean row is the mean of the rows above it, which are rounded to 0.1 as it is itself."""
    for column in ("average", "best", "ensemble"):
        scores = [np.mean(getattr(row, column)) for row in paper.TABLE_3.values()]
        assert np.mean(scores) == pytest.approx(getattr(paper.TABLE_3_MEAN, column)[0], abs=0.1)
    # Its differences, as printed.
    found = [f"{prompt.mean - model.mean:+.1f}" for model, prompt in paper.TABLE_1.values()]
    assert found == ["-0.1", "+12.5", "+1.2", "+0.9", "+0.4", "-1.2", "-1.8"]

"""The ladder's trials are predicted again row by row, and their intervals are over the same rows."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gin
import numpy as np
import pytest
import sklearn.metrics
from tiny import own_caches

from experiments import answers, claims, figures, methods
from experiments.intervals import DRAWS, mean_draws, row_draws, score_of
from experiments.trials import Result, by_ranking, read_trials
from prompt_tuning_jax.eval import main as eval_main
from prompt_tuning_jax.tasks import metrics
from prompt_tuning_jax.train import main as train_main

CB = {"mean_3class_f1": metrics.mean_f1, "accuracy": metrics.accuracy}
ACCURACY = {"accuracy": metrics.accuracy}


def numbers(text: str) -> list[int]:
    return [-1 if one == answers.NO_LABEL else int(one) for one in text]


def trial(targets: str, given: str, ways=ACCURACY, **axes: str) -> Result:
    """Returns a trial with these answers, and with the metrics of the package for them."""
    found = {}
    for metric in ways.values():
        found |= metric(numbers(targets), numbers(given))
    score = float(np.mean([*found.values()]))
    return Result(axes, "train", "task", score, None, found, targets=targets, answers=given)


def random_answers(rng: np.random.Generator, targets: str, right: float) -> str:
    others = rng.choice([*"012", answers.NO_LABEL], len(targets))
    return "".join(np.where(rng.random(len(targets)) < right, [*targets], others))


@pytest.mark.parametrize("ways", [ACCURACY, CB])
def test_scores_of_resampled_rows_are_those_of_scikit_learn(ways):
    """By sample weights; and with each row once, those of the package."""
    rng = np.random.default_rng(0)
    targets = "".join(rng.choice([*"001112"], 56))
    one = trial(targets, random_answers(rng, targets, 0.5), ways)
    assert score_of(one) == pytest.approx(one.score, abs=1e-9)
    counts, (wanted, given) = row_draws(targets), map(numbers, (one.targets, one.answers))
    found = mean_draws({"cb": [one]}, None)
    for draw in range(0, DRAWS, 997):
        weights = {"sample_weight": counts[draw]}
        expected = [sklearn.metrics.accuracy_score(wanted, given, **weights)]
        if "mean_3class_f1" in ways:
            options = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
            expected.append(sklearn.metrics.f1_score(wanted, given, **options, **weights))
        assert found[draw] == pytest.approx(100 * np.mean(expected), abs=1e-9)


def test_a_difference_is_over_the_same_rows():
    """Against the normal distribution: the variances of each side's seeds, and that of the rows' differences."""
    rng = np.random.default_rng(1)
    targets = "".join(rng.choice([*"01"], 500))
    easy = random_answers(rng, targets, 0.6)  # what all answer alike, but for 50 rows each
    sides = []
    for right in (0.9, 0.5):
        seeds = []
        for _ in range(3):
            changed = [*easy]
            for row in rng.choice(500, 50, replace=False):
                changed[row] = targets[row] if rng.random() < right else answers.NO_LABEL
            seeds.append(trial(targets, "".join(changed)))
        sides.append({"sst2": seeds})
    found = claims.difference(*sides)
    right = [100.0 * np.array([[*map(str.__eq__, one.answers, targets)] for one in side["sst2"]]) for side in sides]
    assert found.mean == pytest.approx(right[0].mean() - right[1].mean())
    rows = (right[0].mean(axis=0) - right[1].mean(axis=0)).var() / 500
    seeds = sum(side.mean(axis=1).var() / 3 for side in right)
    # A drawn seed deviates from the mean of seeds in each row, too.
    both = sum((side - side.mean(axis=0)).var() / 3 / 500 for side in right)
    half = 1.96 * math.sqrt(rows + seeds + both)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.03)
    other_rows = claims.difference(sides[0], {"sst2": [one._replace(targets="0" * 500) for one in sides[1]["sst2"]]})
    assert other_rows.high - other_rows.low > 1.5 * (found.high - found.low)
    same = claims.difference({"sst2": sides[0]["sst2"][:1]}, {"sst2": sides[0]["sst2"][:1]})
    assert (same.low, same.mean, same.high) == (0.0, 0.0, 0.0)


def test_two_tasks_of_as_many_rows_have_other_draws():
    assert not np.array_equal(row_draws("01" * 28), row_draws("10" * 28))
    assert row_draws("01" * 28).sum(axis=1) == pytest.approx(np.full(DRAWS, 56.0))


def test_a_vote_is_compared_with_its_prompts_row_by_row():
    targets = "01" * 50
    given = ["1" * 10 + targets[10:], targets[:90] + "0" * 10, targets[:40] + "-" * 20 + targets[60:]]
    prompts = [trial(targets, one, METHOD="prompt_tuning", SIZE="nano", TASK="sst2", RANDOM_SEED="0") for one in given]
    vote = trial(targets, targets, SIZE="nano", TASK="sst2")
    (found,) = claims.claims({"table_3": [vote], "figure_1": prompts})
    average = np.mean([one.score for one in prompts])
    assert found.interval.mean == pytest.approx(100 - average) and found.verdict == "as in the paper"
    rows = np.mean([[a != t for a, t in zip(one, targets, strict=True)] for one in given], axis=0)
    half = 1.96 * 100 * rows.std() / 10
    assert (found.interval.high - found.interval.low) / 2 == pytest.approx(half, rel=0.05)
    unknown = [one._replace(answers="") for one in prompts]
    assert claims.claims({"table_3": [vote], "figure_1": unknown}) == []


def test_the_answers_are_kept_as_they_were_found(tmp_path):
    targets, given = "0120", "01-0"
    one = trial(targets, given, TASK="cb", SIZE="nano")
    kept = {("", "cb", "targets"): targets, ("own", "TASK=cb,SIZE=nano", "generation"): given}
    (tmp_path / answers.FILE).write_text(answers.to_csv(kept))
    found = figures.read_answers(tmp_path / answers.FILE)
    assert found == kept
    without = one._replace(targets="", answers="")
    assert answers.with_answers("own", [without], found) == [one]
    assert answers.with_answers("other", [without], found) == [without]
    ranked = without._replace(ranking_score=25.0)
    kept["own", "TASK=cb,SIZE=nano", "ranking"] = "-1--"
    (joined,) = answers.with_answers("own", [ranked], kept)
    assert by_ranking(joined)._replace(ranking_score=None, ranking_answers="") == one._replace(
        score=25.0, answers="-1--"
    )


def test_answers_of_other_runs_are_an_error(tmp_path):
    one = trial("0101", "0100", TASK="sst2", SIZE="nano")
    found = {("", "sst2", "targets"): "0101", ("own", "TASK=sst2,SIZE=nano", "generation"): "0101"}
    with pytest.raises(ValueError, match=r"score 75.0 by generation, its answers have 100.0: run python -m exp"):
        answers.with_answers("own", [one], found)
    (tmp_path / answers.FILE).write_text("sweep,trial\n")
    with pytest.raises(ValueError, match=r"ladder_answers.csv: no CSV of answers: expected the columns sweep, trial"):
        figures.read_answers(tmp_path / answers.FILE)
    assert figures.read_answers(tmp_path / "none.csv") == {}


@pytest.fixture
def command(tiny, monkeypatch):
    """Returns a function that runs a command line in this process."""

    def run(main, *arguments: object) -> None:
        gin.clear_config()
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        main()

    with own_caches(tiny, monkeypatch):
        yield run


ONLY_TO_TRAIN = tuple(f"--gin.{name}=" for name in ("BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "LOG_PERIOD"))
SPLITS = {"sst2": "validation[:48]", "imdb": "validation[48:80]"}


def test_trials_are_predicted_again(tiny, tmp_path, command, capsys):
    """Checks that the answers have the scores that `train` and `eval` computed, for each kind of trial.

    The kinds are a run on its own rows, a run on the rows of another task, and the vote of several prompts.
    """
    runs, out = tmp_path / "runs", tmp_path / "out"

    def tune(method: str, task: str, seed: int, *files: str, **macros: object) -> Path:
        folder = runs / "figure_1_ladder" / f"METHOD={method},SIZE=nano,TASK={task},RANDOM_SEED={seed}"
        macros |= {"MODEL_DIR": str(folder), "EVAL_SPLIT": SPLITS[task], "RANDOM_SEED": seed}
        command(train_main, *tiny.arguments(*files, **macros))
        return folder

    def score(name: str, task: str, **macros: object) -> None:
        macros |= {"MODEL_DIR": str(runs / name), "EVAL_SPLIT": SPLITS[task]}
        arguments = tiny.arguments("runs/eval.gin", **macros)
        command(eval_main, *(one for one in arguments if not one.startswith(ONLY_TO_TRAIN)))

    # The prompts' base model is a tuned one, which writes labels. Random weights never do.
    model = tune("model_tuning", "sst2", 0, "runs/model_tune.gin", LEARNING_RATE=0.01, TRAIN_STEPS=100, EVAL_PERIOD=50)
    short = {"INITIAL_CHECKPOINT_PATH": str(model / "best" / "model"), "TRAIN_STEPS": 10, "EVAL_PERIOD": 10}
    prompts = [str(tune("prompt_tuning", "sst2", seed, **short)) for seed in range(3)]
    tune("prompt_tuning", "imdb", 0, **short)
    tune("multi_task", "sst2", 0, **short)
    base = {"INITIAL_CHECKPOINT_PATH": short["INITIAL_CHECKPOINT_PATH"]}
    moved = "METHOD=prompt_tuning,SIZE=nano,FROM=sst2,TASK=imdb,OF_SEED=0"
    score(f"table_1_transfer_ladder/{moved}", "imdb", PROMPT_FILE=prompts[0], **base)
    score("table_3_ladder/SIZE=nano,TASK=sst2", "sst2", PROMPT_FILES=prompts, **base)
    capsys.readouterr()
    command(answers.main, f"--results={runs}", f"--out={out}")
    found = figures.read_answers(out / answers.FILE)
    assert capsys.readouterr().out == f"{out / answers.FILE}: {len(found)} rows\n"
    ways = [(sweep, way) for sweep, _, way in found]
    assert sorted(ways) == [
        *[("", "targets")] * 2,
        *[("figure_1_ladder", "generation")] * 5,
        ("table_1_transfer_ladder", "generation"),
        ("table_1_transfer_ladder", "ranking"),
        ("table_3_ladder", "generation"),
    ]
    assert not any("multi_task" in name for _, name, _ in found)
    assert len(found["", "sst2", "targets"]) == 48 and len(found["table_1_transfer_ladder", moved, "ranking"]) == 32
    # The comparison of methods predicts in the same way.
    values = {"METHOD": "official", "SIZE": "nano", "TASK": "sst2", "LEARNING_RATE": "0.3", "RANDOM_SEED": "0"}
    (one,) = methods.collect([SimpleNamespace(folder=Path(prompts[0]), name="official", values=values)])
    given, targets = found["figure_1_ladder", Path(prompts[0]).name, "generation"], found["", "sst2", "targets"]
    assert one.right.tolist() == [*map(str.__eq__, given, targets)]
    for sweep in ("figure_1_ladder", "table_1_transfer_ladder", "table_3_ladder"):
        joined = answers.with_answers(sweep, read_trials(runs / sweep)[0], found)  # which compares the scores
        assert all(one.answers and one.score > 0 for one in joined if one.axes.get("METHOD") != "multi_task")


def test_a_run_without_the_score_of_its_summary_is_an_error(tiny, tmp_path, command, capsys):
    folder = tmp_path / "figure_1_ladder" / "METHOD=prompt_tuning,SIZE=nano,TASK=sst2,RANDOM_SEED=0"
    command(train_main, *tiny.arguments(MODEL_DIR=str(folder), TRAIN_STEPS=10, EVAL_PERIOD=10))
    summary = json.loads((folder / "summary.json").read_text())
    summary["best"]["accuracy"] += 1.0
    (folder / "summary.json").write_text(json.dumps(summary))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(answers.main, f"--results={tmp_path}", f"--out={tmp_path}")
    assert stopped.value.code == 2
    assert "its summary says" in capsys.readouterr().err and not (tmp_path / answers.FILE).exists()


def test_results_must_have_figure_1(tmp_path, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(answers.main, f"--results={tmp_path}")
    assert stopped.value.code == 2 and "set --results to the one that the sweeps are in" in capsys.readouterr().err

"""The comparison of methods: which trials it asks for, its intervals, and its table."""

import json

import numpy as np
import pytest

from experiments import methods

SWEEP = "--gin_file=sweeps/methods.gin"
DATA = "--gin.DATA_DIR='data'"


pytestmark = pytest.mark.usefixtures("only_this_tests_gin")


def found(method="official", task="sst2", rate="0.3", seed=0, right=(True, False), curve=((20, 50.0), (40, 50.0))):
    return methods.TrialResult(
        method, "nano", task, rate, seed, dict(curve), 40, 300, 2560, 10_368, np.array(right), "d78aa9ae865fc70a"
    )


def test_an_interval_of_one_seed_is_that_of_a_proportion():
    """The normal approximation's: 1.96 standard errors on each side."""
    right = np.zeros((1, 1000))
    right[:, :730] = 100.0
    interval = methods.bootstrap(right)
    error = 196.0 * np.sqrt(0.73 * 0.27 / 1000)
    assert interval.mean == pytest.approx(73.0)
    # A percentile of 10,000 draws has a standard error of 0.04 here, and the rows make steps of 0.1.
    assert (interval.low, interval.high) == pytest.approx((73.0 - error, 73.0 + error), abs=0.2)


def test_seeds_that_differ_widen_an_interval():
    """Without rows that differ, it is the seeds' alone: the mean of 3 draws of 3 has variance 2/3 / 3 of these."""
    values = np.repeat([[0.0], [50.0], [100.0]], 400, axis=1)
    interval = methods.bootstrap(values)
    # 1 in 27 draws has all three of the lowest, more than 2.5 in 100: so the interval reaches from end to end.
    assert (interval.mean, interval.low, interval.high) == (50.0, 0.0, 100.0)


def test_a_difference_on_the_same_rows_is_told_where_the_scores_alone_would_not_tell_it():
    rng = np.random.default_rng(0)
    plain = 100.0 * (rng.random((3, 400)) < 0.7)
    plain[:] = plain[0]
    better = plain.copy()
    better[:, np.flatnonzero(plain[0] == 0)[:12]] = 100.0  # 3 points
    alone = methods.bootstrap(plain)
    assert alone.low < better.mean() < alone.high
    assert methods.bootstrap(better - plain).excludes_zero
    assert not methods.bootstrap(plain - plain).excludes_zero


def test_steps_to_99_per_cent_of_the_best():
    assert methods.steps_to({20: 50.0, 40: 79.3, 60: 80.0, 80: 70.0}) == 40
    assert methods.steps_to({20: 50.0, 40: 79.1, 60: 80.0}) == 60


def test_the_first_seed_of_all_rates_and_then_the_best_rates_other_seeds(tmp_path):
    _, trials = methods.settings_of([SWEEP, DATA, f"--gin.SWEEP_DIR='{tmp_path}'"])
    first = methods.next_trials(trials, {})
    assert {trial.values["RANDOM_SEED"] for trial in first} == {"0"}
    assert 3 * len(first) == len(trials)
    cell = [trial for trial in trials if trial.values["METHOD"] == "fresh" and trial.values["TASK"] == "mrpc"]
    scores = {trial.name: 60.0 for trial in cell if trial.values["RANDOM_SEED"] == "0"}
    best = next(name for name in scores if "LEARNING_RATE=0.3," in name)
    scores[best] = 61.0
    for name, score in scores.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"best": {"accuracy": score}}))
    assert methods.finished_scores(trials) == scores
    then = [trial.name for trial in methods.next_trials(trials, scores) if trial in cell]
    assert then == [best.replace("SEED=0", f"SEED={seed}") for seed in (1, 2)]
    assert len(methods.next_trials(trials, scores)) == len(first) - 3 + 2


def test_the_table_is_kept_as_it_was_found(tmp_path):
    kept = [found(seed=seed, right=np.random.default_rng(seed).random(13) < 0.5) for seed in range(3)]
    methods.to_csv(kept, tmp_path / "methods.csv")
    again = methods.from_csv(tmp_path / "methods.csv")
    for one, other in zip(kept, again, strict=True):
        assert one._replace(right=None) == other._replace(right=None)
        np.testing.assert_array_equal(one.right, other.right)


def test_a_table_has_the_best_rate_and_says_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    base = rng.random(500) < 0.6
    much = base | (rng.random(500) < 0.3)
    rows = [found(rate=rate, right=base if rate == "0.3" else base & False) for rate in ("0.1", "0.3", "1.0")]
    rows += [found(seed=seed, right=base) for seed in (1, 2)]
    rows += [found("fresh", seed=seed, right=base ^ (np.arange(500) == seed)) for seed in range(3)]
    rows += [found("lora", rate="0.01", seed=seed, right=much, curve=((20, 50.0), (60, 80.0))) for seed in range(3)]
    lines = methods.table(rows, "nano", "sst2").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| lora", "| fresh", "| official"] or lines[0].startswith(
        "| lora"
    )
    plain = next(line for line in lines if line.startswith("| official"))
    assert "| 0.3 of 3 | 3 |" in plain and f"{100 * base.mean():.1f} [" in plain
    assert ": none |" in next(line for line in lines if line.startswith("| fresh"))
    assert ": none" not in lines[0] and "| 60, 60, 60 |" in lines[0]


def test_the_verdict_names_each_method_once():
    """By how many more rows are right, the same rows for each seed: 100, 60 fewer, 1 here and 1 there."""
    base = np.arange(500) < 300
    rights = {
        "official": base,
        "lora": np.arange(500) < 400,
        "ia3": np.arange(500) < 240,
        "fresh": base ^ (np.arange(500) == 299) ^ (np.arange(500) == 300),
        "spot": base,  # of a single seed: nothing is said of it
    }
    rows = [found(name, seed=seed, right=right) for name, right in rights.items() for seed in range(3)][:-2]
    assert methods.verdict(rows, "nano", "sst2") == (
        "Better than official: lora. Worse than official: ia3. No difference to official: fresh."
    )


def test_a_command_line_says_one_thing(monkeypatch, capsys):
    monkeypatch.setattr(methods.sys, "argv", ["methods", "--next", "--page"])
    with pytest.raises(SystemExit) as left:
        methods.main()
    assert left.value.code == 2
    assert "expected one of --next, --collect, --page" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--next"], ["--page", "--gin_file=sweeps/demo.gin"], ["--page", SWEEP, SWEEP]])
def test_a_command_line_names_one_sweep_that_has_a_page(argv, monkeypatch, capsys):
    monkeypatch.setattr(methods.sys, "argv", ["methods", *argv])
    with pytest.raises(SystemExit) as left:
        methods.main()
    assert left.value.code == 2
    assert "expected --gin_file=sweeps/methods.gin or --gin_file=sweeps/fast.gin" in capsys.readouterr().err


def test_a_page_and_its_figure_are_of_the_kept_file_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.random(500) < 0.6
    rows = [found(seed=seed, right=base) for seed in range(3)]
    rows += [found("lora", rate="0.01", seed=seed, right=base | (rng.random(500) < 0.3)) for seed in range(3)]
    methods.to_csv(rows, tmp_path / "methods.csv")
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    monkeypatch.setattr(methods.sys, "argv", ["methods", "--page", SWEEP])
    methods.main()
    written = (tmp_path / "methods.md").read_text()
    assert "## sst2, nano: 500 rows, 300 steps" in written and methods.table(rows, "nano", "sst2") in written
    above, below = methods.draw(rows, "nano").axes
    (container,) = above.containers
    over = methods.bootstrap(methods.cells(rows)["nano", "sst2", "lora"].right - 100.0 * np.stack([base] * 3))
    assert [float(x) for x in container.lines[0].get_xdata()] == pytest.approx([over.mean])
    assert len(below.lines) == 2 and (tmp_path / "methods.png").stat().st_size > 1000

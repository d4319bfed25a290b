"""A sweep's summaries become one CSV and one table, and nothing is dropped in silence."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from experiments import collect
from experiments.averages import group, mean_over
from experiments.trials import Result, from_csv, read_trials, split_mixtures, to_csv


def train_summary(task: str, best: dict[str, float], **other) -> dict:
    """What a training run leaves, as far as it is read."""
    return {
        "task": task,
        "base_fingerprint": "d78aa9ae865fc70a",
        "seed": 0,
        "steps": 200,
        "best_step": 150,
        "best": best,
        "examples_seen": 6400,
        "seconds": 12.5,
    } | other


def write_trial(sweep: Path, name: str, summary: dict | str | None) -> Path:
    folder = sweep / name
    folder.mkdir(parents=True)
    if summary is not None:
        text = summary if isinstance(summary, str) else json.dumps(summary)
        (folder / "summary.json").write_text(text)
    return folder


def trial(score: float | None, metrics: dict[str, float] | None = None, **axes: str) -> Result:
    return Result(axes, "train", axes.get("TASK", "mixture"), score, None, metrics or {"accuracy": score})


@pytest.fixture
def run(monkeypatch):
    """The command in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
        collect.main()

    return run


def test_tables_are_written_beside_the_sweeps_folder(tmp_path, run):
    write_trial(tmp_path / "runs" / "own", "RANDOM_SEED=9", train_summary("cb", {"accuracy": 41.0}))
    run(tmp_path / "runs" / "own")
    assert (tmp_path / "runs" / "own.csv").is_file() and (tmp_path / "runs" / "own.md").is_file()


def test_every_trial_is_a_row(tmp_path, run):
    sweep = tmp_path / "runs" / "figure"
    write_trial(sweep, "SIZE=nano,TASK=cb,RANDOM_SEED=10", train_summary("cb", {"accuracy": 40.0, "f1": 20.5}))
    write_trial(sweep, "SIZE=nano,TASK=cb,RANDOM_SEED=9", train_summary("cb", {"accuracy": 41.0, "f1": 21.0}))
    write_trial(sweep, "SIZE=micro,TASK=sst2,RANDOM_SEED=9", train_summary("sst2", {"accuracy": 0.1 + 0.2}))
    (sweep / "logs").mkdir()  # no trial
    run(sweep, f"--out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "figure.csv").read_text() == (
        "SIZE,TASK,RANDOM_SEED,command,task,score,ranking_score,accuracy,f1,"
        "best_step,steps,seconds,examples_seen,base_fingerprint\n"
        "nano,cb,9,train,cb,31.0,,41.0,21.0,150,200,12.5,6400,d78aa9ae865fc70a\n"
        "nano,cb,10,train,cb,30.25,,40.0,20.5,150,200,12.5,6400,d78aa9ae865fc70a\n"
        "micro,sst2,9,train,sst2,0.30000000000000004,,0.30000000000000004,,150,200,12.5,6400,d78aa9ae865fc70a\n"
    )
    assert (
        "| nano | cb | 2 | 30.6 ± 0.5 | accuracy 40.5 ± 0.7; f1 20.8 ± 0.4 |"
        in (tmp_path / "out" / "figure.md").read_text().splitlines()
    )


def test_trials_without_a_result_are_named_and_the_others_kept(tmp_path, run, capsys):
    sweep = tmp_path / "sweep"
    for name, summary in {
        "RANDOM_SEED=0": train_summary("cb", {"accuracy": 40.0}),
        "RANDOM_SEED=1": None,
        "RANDOM_SEED=2": None,
        "RANDOM_SEED=3": '{"task": "cb", "best": {"accu',
        "RANDOM_SEED=4": "[]",
        "RANDOM_SEED=5": {"best": {"accuracy": 1.0}},
        "RANDOM_SEED=6": train_summary("cb", {}),
    }.items():
        write_trial(sweep, name, summary)
    (sweep / "RANDOM_SEED=2" / "failed.txt").write_text("Traceback\nMemoryError: out of it\n")
    run(sweep, f"--out={tmp_path}")
    assert [result.axes["RANDOM_SEED"] for result in from_csv((tmp_path / "sweep.csv").read_text())] == ["0"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    for line, seed in zip(said, range(1, 7), strict=True):
        assert f"RANDOM_SEED={seed}" in line
    assert said[0].endswith("not finished") and said[1].endswith("failed: MemoryError: out of it")
    assert all("cannot be read" in line for line in said[2:])


def test_what_evaluations_found(tmp_path):
    """The shapes that `training.eval_run.evaluate_prompt` returns: a task, a mixture, several prompts."""
    both = {"generation": {"em": 1.0, "f1": 2.0}, "ranking": {"em": 30.0, "f1": 40.0}}
    votes = {
        "average": {"accuracy": 50.0},
        "best": {"accuracy": 52.0, "prompt": "a.npy"},
        "ensemble": {"accuracy": 51.0},
        "prompts": {"a.npy": {"accuracy": 52.0}, "b.npy": {"accuracy": 48.0}},
    }
    for name, found in {
        "TEXT=task": both | {"no_label_count": 3},
        "TEXT=mixture": {"tasks": {"pr:one": both, "two": {"generation": {"f1": 9.0}}}, "score": 5.25},
        "TEXT=votes": {"generation": votes, "ranking": votes},
    }.items():
        write_trial(
            tmp_path, name, {"task": "t", "split": "validation", "examples": 10, "base_fingerprint": "x"} | found
        )
    results, problems = read_trials(tmp_path)
    found = {result.axes["TEXT"]: result for result in results}
    assert not problems and {result.command for result in results} == {"eval"}
    assert found["task"].metrics == {"em": 1.0, "f1": 2.0, "ranking em": 30.0, "ranking f1": 40.0}
    assert (found["task"].score, found["task"].ranking_score, found["task"].best_step) == (1.5, 35.0, None)
    assert found["mixture"].metrics == {
        **{"pr:one/em": 1.0, "pr:one/f1": 2.0, "ranking pr:one/em": 30.0, "ranking pr:one/f1": 40.0},
        "two/f1": 9.0,
    }
    assert found["mixture"].score == 5.25  # the mean of 1.5 and 9: a task counts once, however many metrics it has
    columns = {"average accuracy": 50.0, "best accuracy": 52.0, "ensemble accuracy": 51.0}
    assert found["votes"].metrics == columns | {f"ranking {name}": value for name, value in columns.items()}
    assert (found["votes"].score, found["votes"].ranking_score) == (51.0, 51.0)
    assert from_csv(to_csv(results)) == results


def test_losses_are_no_scores(tmp_path, run):
    sweep = tmp_path / "spans"
    for seed, loss in enumerate((4.25, 4.5)):
        write_trial(sweep, f"RANDOM_SEED={seed}", train_summary("text", {"loss": loss, "token_accuracy": 30.0}))
    run(sweep, f"--out={tmp_path}")
    assert "| 2 |  | loss 4.375 ± 0.177; token_accuracy 30.000 ± 0.000 |" in (tmp_path / "spans.md").read_text()


def test_mean_and_standard_deviation_by_their_definitions():
    scores = {
        ("a", "0"): 50.0,
        ("a", "1"): 53.0,
        ("a", "2"): 61.0,
        ("b", "0"): 10.0,
        ("b", "1"): 30.0,
        ("b", "2"): 20.5,
    }
    results = [trial(score, TASK=task, RANDOM_SEED=seed) for (task, seed), score in scores.items()]
    for one in group(results):
        values = [score for (task, _), score in scores.items() if task == one.axes["TASK"]]
        assert one.n == 3 and one.axes.keys() == {"TASK"}
        # Of three numbers of two digits: the same operations in another order.
        assert one.score == pytest.approx((statistics.mean(values), statistics.stdev(values)), rel=1e-12)
        assert one.metrics["accuracy"] == one.score
    (mean,) = mean_over(results)
    of_seeds = [(scores["a", seed] + scores["b", seed]) / 2 for seed in "012"]
    assert mean.axes == {"TASK": "mean"} and mean.n == 3 and not mean.note
    assert mean.score == pytest.approx((statistics.mean(of_seeds), statistics.stdev(of_seeds)), rel=1e-12)
    (alone,) = group(results[:1])
    assert alone.score == (50.0, None) and f"{alone.score}" == "50.0"


def test_a_seed_without_every_task_counts_in_no_mean(tmp_path, run):
    scores = {("0", "a"): 10.0, ("0", "b"): 20.0, ("1", "a"): 90.0, ("2", "a"): 12.0, ("2", "b"): 24.0}
    for size in ("nano", "micro"):
        for (seed, task), score in scores.items():
            if size == "nano" or task == "a":
                name = f"SIZE={size},TASK={task},RANDOM_SEED={seed}"
                write_trial(tmp_path / "sweep", name, train_summary(task, {"accuracy": score}))
    run(tmp_path / "sweep", f"--out={tmp_path}", "--mean_over=TASK")
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert "| nano | mean | 2 | 16.5 ± 2.1 | 2 of 3 are whole, missing b |" in lines
    assert "| micro | mean | 0 |  | 0 of 3 are whole, missing b |" in lines


def test_a_mixture_is_split_into_the_tasks_of_the_others():
    """Multi-task training names its inputs' tasks, the prompts' runs do not; what only the mixture has is left out."""
    alone = trial(50.0, TASK="cb", METHOD="prompt", RANDOM_SEED="0")._replace(task="taskless_super_glue_cb_v102")
    metrics = {"super_glue_cb_v102/f1": 60.0, "super_glue_cb_v102/accuracy": 70.0, "dpr_v001/accuracy": 5.0}
    mixture = trial(35.0, metrics, METHOD="multi_task", RANDOM_SEED="0")
    first, second = split_mixtures([alone, mixture])
    assert first == alone
    assert second.axes == {"METHOD": "multi_task", "TASK": "cb", "RANDOM_SEED": "0"}
    assert second.score == 65.0 and second.metrics == {"f1": 60.0, "accuracy": 70.0}
    assert [result.axes["TASK"] for result in split_mixtures([mixture])] == ["super_glue_cb_v102", "dpr_v001"]


@pytest.mark.parametrize("beside", ["", "taskless_", "sentinel_taskless_"])
def test_the_papers_mixture_has_each_task_of_the_figure(beside):
    """The tasks of figure 1, and how the mixture of the multi-task runs calls those that it is evaluated on."""
    names = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic")
    alone = {name: f"{beside}super_glue_{name}_v102" for name in names}
    alone["wsc"] = f"{beside}super_glue_wsc_and_dev_v102_simple"
    inside = {name: f"super_glue_{name}_v102_examples" for name in names}
    inside["wsc"] = "super_glue_wsc_v102_simple_eval_examples"
    metrics = {f"{task}/accuracy": float(at) for at, task in enumerate(inside.values())}
    runs = [trial(50.0, TASK=name)._replace(task=task) for name, task in alone.items()]
    split = split_mixtures([*runs, trial(3.5, metrics, METHOD="multi_task")])[len(runs) :]
    assert {result.axes["TASK"]: result.score for result in split} == {name: at for at, name in enumerate(inside)}


def test_only_axes_that_differ_are_columns(tmp_path, run):
    for rate in ("0.3", "0.03"):
        for seed in (0, 1):
            name = f"SIZE=nano,LEARNING_RATE={rate},OF_SEED={seed}"
            write_trial(tmp_path / "sweep", name, train_summary("cb", {"accuracy": 10.0 + seed}))
    run(tmp_path / "sweep", f"--out={tmp_path}", "--seeds=OF_SEED")
    text = (tmp_path / "sweep.md").read_text()
    assert "| LEARNING_RATE | n | score | metrics |" in text and "SIZE nano in all." in text
    assert text.index("| 0.03 | 2 | 10.5 ± 0.7 |") < text.index("| 0.3 | 2 |")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere"], ["no sweep at nowhere", "SWEEP_DIR"]),
        (["empty"], ["no trial in empty", "SWEEP_DIR"]),
        (["sweep", "--mean_over=TSAK"], ["no axis TSAK", "SIZE", "--mean_over"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, run, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(tmp_path)
    Path("empty", "logs").mkdir(parents=True)
    write_trial(tmp_path / "sweep", "SIZE=nano", train_summary("cb", {"accuracy": 1.0}))
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--out=out")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in parts), said


def test_a_file_that_is_no_csv_of_trials():
    for text in ("", "a,b\n1,2\n", "SIZE,command,score\nnano,train,1\n"):
        with pytest.raises(ValueError, match="expected the columns command"):
            from_csv(text)


def test_it_starts_without_jax():
    code = "import sys, experiments.collect; "
    code += "print(sorted({'jax', 'tensorflow', 'seqio', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

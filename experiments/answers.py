"""Predicts the rows of the ladder's finished trials again, so that settings can be compared row by row.

    python -m experiments.answers [--results=runs] [--out=experiments/results]

RESULTS has the folders of the ladder's sweeps: RESULTS/figure_1_ladder and so on. OUT/ladder_answers.csv gets the
answers of the trials that an interval is about, each with the parameters of its best evaluation.
"""

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gin
import numpy as np

from experiments.collect import RESULTS
from experiments.intervals import score_of
from experiments.trials import Result, by_ranking, name_of, read_trials
from prompt_tuning_jax import gin_files
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.checkpoints.model import Model, load
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.inference.ensembling import Ensemble
from prompt_tuning_jax.tasks.metrics import task_score
from prompt_tuning_jax.training.evaluation import Evaluator, Predictions, postprocess
from prompt_tuning_jax.training.run import TrainConfig

FILE = "ladder_answers.csv"
FIGURE_1 = "figure_1_ladder"
TUNED = (FIGURE_1, "methods_ladder", *(f"figure_3{part}_ladder" for part in "abcd"))
TRANSFER, VOTES = "table_1_transfer_ladder", "table_3_ladder"
METHODS = ("prompt_tuning", "model_tuning")  # of figure 1; its other methods have no interval
VOTERS = ("0", "1", "2")  # the seeds of the prompts that vote
COLUMNS = ("sweep", "trial", "way", "answers")
GENERATION, RANKING = "generation", "ranking"  # ways to answer; a vote is of generated answers
TARGETS = "targets"  # in the column "way": the trial is a task, and the answers are its right labels
NO_LABEL = "-"

Key = tuple[str, str, str]  # sweep, trial and way


class Runs:
    """Predicts with what runs have trained. Each base model is loaded once."""

    def __init__(self) -> None:
        self._configs: dict[Path, TrainConfig] = {}
        self._models: dict[str, tuple[Model, Evaluator]] = {}

    def config(self, folder: Path) -> TrainConfig:
        """Returns the configuration of the run in a folder, which was configured with gin."""
        if folder not in self._configs:
            gin.clear_config()
            gin_files.parse([f"--gin_file={folder / 'config.gin'}", f"--gin.MODEL_DIR={str(folder)!r}"])
            self._configs[folder] = gin_files.configured(TrainConfig, "runs/prompt_tune.gin")()
            gin.clear_config()
        return self._configs[folder]

    def model(self, config: TrainConfig) -> tuple[Model, Evaluator]:
        """Returns the base model of a run, and what evaluates it."""
        where = config.initial_checkpoint_path
        if where not in self._models:
            model = load(where)
            self._models[where] = model, Evaluator(model.config, model.tokenizer)
        return self._models[where]

    def batches(self, config: TrainConfig) -> Batches:
        """Returns the rows that a run on one task is evaluated on."""
        ((_, batches),) = config.eval_dataset.eval_batches(self.model(config)[0].tokenizer, say=None).items()
        return batches

    def predictions(self, folder: Path, of: Path, way: str = GENERATION) -> tuple[Batches, Predictions]:
        """Returns the rows that a run is evaluated on, and what another run, or the same one, predicts for them.

        Args:
          folder: the folder of the run that predicts.
          of: the folder of the run whose rows are predicted.
          way: `GENERATION`, or `RANKING` of the task's labels.
        """
        model, evaluator = self.model(self.config(folder))
        injection, batches = injection_of(folder, model.config), self.batches(self.config(of))
        if way == GENERATION:
            return batches, evaluator.predictions(injection, dict(model.parameters), batches)
        texts = evaluator.ranked(injection, dict(model.parameters), batches)
        assert texts is not None
        return batches, postprocess(batches.examples, texts)

    def vote(self, folders: Sequence[Path]) -> tuple[Batches, Predictions]:
        """Returns the rows of runs on the same task, and the majority vote of the prompts of these runs."""
        config = self.config(folders[0])
        model, _ = self.model(config)
        prompts = [injection_of(folder, model.config).prompt for folder in folders]
        batches = self.batches(config)
        votes = Ensemble(model.config, model.tokenizer, [np.asarray(prompt) for prompt in prompts])
        return batches, postprocess(batches.examples, votes.generated(dict(model.parameters), batches).majority())


def written(labels: Sequence[int]) -> str:
    """Returns one character per row: the number of the label, or `NO_LABEL` for -1, an answer that is no label."""
    return "".join(NO_LABEL if label == -1 else str(label) for label in labels)


def collect(results: Path, sweeps: Mapping[str, Sequence[Result]]) -> dict[Key, str]:
    """Returns the answers of each trial that an interval is about, and the right labels of each task.

    Args:
      results: the folder of the sweeps' folders.
      sweeps: the finished trials by the sweep's name.

    Raises:
      ValueError: a trial's answers do not have the score in its summary.json, or the rows of a task differ.
    """
    runs, found = Runs(), {}

    def add(sweep: str, trial: Result, way: str, batches: Batches, predictions: Predictions) -> None:
        name, task = name_of(trial.axes), trial.axes["TASK"]
        score, said = task_score(predictions.metrics(batches.examples)), score_by(trial, way)
        if score is None or said is None or abs(score - said) > 1e-6:
            raise ValueError(f"{sweep}: the answers of {name} by {way} have the score {score}, its summary says {said}")
        targets = written(predictions.targets)
        if found.setdefault(("", task, TARGETS), targets) != targets:
            raise ValueError(f"{sweep}: {name} has other rows than the trials before it, expected one split of {task}")
        found[sweep, name, way] = written(predictions.answers)
        print(f"{sweep}, {name}: {score:.1f} by {way}", file=sys.stderr)

    def run_of(axes: Mapping[str, str], **changed: str) -> Path:
        """Returns the folder of figure 1's trial with these axes, some of them changed."""
        axes = {**axes, **changed}
        return results / FIGURE_1 / name_of({axis: axes[axis] for axis in ("METHOD", "SIZE", "TASK", "RANDOM_SEED")})

    for sweep, trials in sweeps.items():
        for trial in trials:
            axes = trial.axes
            if sweep == TRANSFER:
                moved = run_of(axes, TASK=axes["FROM"], RANDOM_SEED=axes["OF_SEED"])
                rows = run_of(axes, RANDOM_SEED=axes["OF_SEED"])
                for way in (GENERATION, RANKING):
                    add(sweep, trial, way, *runs.predictions(moved, rows, way))
            elif sweep == VOTES:
                prompts = [run_of(axes, METHOD=METHODS[0], RANDOM_SEED=seed) for seed in VOTERS]
                add(sweep, trial, GENERATION, *runs.vote(prompts))
            elif sweep != FIGURE_1 or axes["METHOD"] in METHODS:
                folder = results / sweep / name_of(axes)
                add(sweep, trial, GENERATION, *runs.predictions(folder, folder))
    return found


def score_by(trial: Result, way: str) -> float | None:
    """Returns a trial's score by generated or by ranked answers."""
    return trial.ranking_score if way == RANKING else trial.score


def to_csv(found: Mapping[Key, str]) -> str:
    """Returns a CSV with one row per trial and way, and one per task with its right labels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([*key, answers] for key, answers in found.items())
    return text.getvalue()


def from_csv(text: str) -> dict[Key, str]:
    """Reads a CSV that `to_csv` wrote.

    Raises:
      ValueError: the text is not such a CSV.
    """
    header, *rows = csv.reader(io.StringIO(text), strict=True) if text.strip() else [[]]
    if tuple(header) != COLUMNS:
        raise ValueError(f"no CSV of answers: expected the columns {', '.join(COLUMNS)}")
    return {(sweep, trial, way): answers for sweep, trial, way, answers in rows}


def with_answers(sweep: str, results: Sequence[Result], found: Mapping[Key, str]) -> list[Result]:
    """Returns the trials of a sweep with their answers; a trial that has none in `found` is unchanged.

    Raises:
      ValueError: answers do not have the score of their trial.
    """
    joined = []
    for trial in results:
        name, task = name_of(trial.axes), trial.axes.get("TASK", "")
        answers, ranking = (found.get((sweep, name, way), "") for way in (GENERATION, RANKING))
        trial = trial._replace(answers=answers, ranking_answers=ranking)
        if answers or ranking:
            trial = trial._replace(targets=found["", task, TARGETS])
        for way, given in ((GENERATION, trial), (RANKING, by_ranking(trial))):
            if given.answers and abs(score_of(given) - (given.score or 0.0)) > 1e-3:
                raise ValueError(
                    f"{name} of {sweep} has the score {given.score} by {way}, its answers have {score_of(given)}: "
                    "run python -m experiments.answers again"
                )
        joined.append(trial)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default="runs", help="the folder that the sweeps' folders are in")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    with gin_files.user_errors():
        if not (args.results / FIGURE_1).is_dir():
            raise ValueError(f"no folder {args.results / FIGURE_1}: set --results to the one that the sweeps are in")
        sweeps = {}
        for name in (*TUNED, TRANSFER, VOTES):
            if (args.results / name).is_dir():
                sweeps[name], problems = read_trials(args.results / name)
                for problem in problems:
                    print(problem, file=sys.stderr)
        found = collect(args.results, sweeps)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / FILE).write_text(to_csv(found))
        print(f"{args.out / FILE}: {len(found)} rows")


if __name__ == "__main__":
    main()

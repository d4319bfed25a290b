"""Evaluates the base model, alone or with what was trained, on the tasks of a split.

A task's score is computed from generated answers and, if the task has labels, also from ranked labels.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.checkpoints.base import (
    auto_dtype,
    check_base_dtype,
    expected_shapes,
    load_base,
    open_vocabulary,
    resolve,
    with_ids,
    with_size,
)
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.checkpoints.trained_on import trained_on
from prompt_tuning_jax.checkpoints.tuned import injection_of
from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.inference.ensembling import Ensemble, Votes
from prompt_tuning_jax.methods.method import Injection, Params
from prompt_tuning_jax.parallel.mesh import MeshSizes
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import is_writer
from prompt_tuning_jax.prompts.initializers import written_prompt
from prompt_tuning_jax.settings import Count, InstanceOf, Name, Natural, Switch, Text, Texts, check_values
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.metrics import suite_score, task_score
from prompt_tuning_jax.tasks.postprocessors import UNLABELLED
from prompt_tuning_jax.training.evaluation import (
    Evaluator,
    Predictions,
    check_labels,
    data_warnings,
    postprocess,
    takes_scores,
)
from prompt_tuning_jax.training.mesh_choice import partitioner_of
from prompt_tuning_jax.training.run_folder import check_writable, write_text
from prompt_tuning_jax.training.submission import start_submission, write_file


def evaluate_prompt(
    *,
    size: Annotated[T5Config | Any, InstanceOf(T5Config)],
    initial_checkpoint_path: Name,
    dataset: Annotated[DatasetConfig | Any, InstanceOf(DatasetConfig)],
    prompt_file: Text | None = None,
    prompt_files: Texts | None = None,
    prompt_text: Text | None = None,
    vocabulary: Text | None = None,
    base_dtype: str | Any = "auto",
    num_partitions: Count | None = None,
    mesh: MeshSizes | None = None,
    samples: Natural = 0,
    submission: Text | None = None,
    model_dir: Name | None = None,
    check_only: Switch = False,
) -> dict[str, Any]:
    """Evaluates a prompt, an adapter, a tuned model, an ensemble of prompts, or the base model alone.

    With `submission`, it writes the predictions for a benchmark's server instead.

    Args:
      size: the base model's configuration.
      initial_checkpoint_path: the base model, as `checkpoints.base.resolve` takes it.
      dataset: the task or mixture, and the split.
      prompt_file: what was trained on this base model, see `checkpoints.tuned.injection_of`; None for the base model
        alone.
      prompt_files: several prompts, which are evaluated separately and as an ensemble (section 6 of the paper).
      prompt_text: a prompt in words, whose subwords are put in front of each row's inputs (prompt design).
      vocabulary: a tokenizer; None for the tokenizer beside the base model.
      base_dtype: dtype of the base model in memory; see `checkpoints.base.load_base`.
      num_partitions, mesh: as in `run.TrainConfig`. Ensembles ignore them and use one device.
      samples: number of right answers, and of wrong answers, of each task to write to stderr.
      submission: a folder for the files that a benchmark's server scores. No metrics are then computed.
      model_dir: a folder for summary.json, which gets the returned dictionary; None to write nothing.
      check_only: whether to return {} after the checks that read no file.

    Returns:
      The task, split, number of examples, base model and prompt, and the results, with metrics in per cent. For one
      task, these are the entries of `task_result`; for several, "tasks", with such entries for each task by name, and
      the entries of `suite_result`. For an ensemble, `ensemble_result` replaces `task_result`. For a submission, the
      only result is "submission", a list of what `submission.write_file` returned for each file.

    Raises:
      ValueError: a setting, a file or the data is invalid; the message names the setting to change.
    """
    check_values(evaluate_prompt, locals())
    check_base_dtype(base_dtype)
    with renamed(batch_size="eval_batch_size", train_split="eval_split"):
        dataset.check()
    check_prompt_files(prompt_file, prompt_files, prompt_text, submission)
    if check_only:
        return {}
    size = with_size(size, initial_checkpoint_path)
    if model_dir is not None:
        check_writable(Path(model_dir))
    location = resolve(initial_checkpoint_path)
    tokenizer = open_vocabulary(vocabulary, location, size)
    size = with_ids(size, tokenizer)
    injection, several = Injection(), {}
    sources = {path: trained_on(path) for path in prompt_files or ([prompt_file] if prompt_file else ())}
    for path, source in sources.items():
        source.check(f"prompt {path}", None, tokenizer.fingerprint)  # before the base model is read
    if prompt_files:
        several = {path: prompt_of(injection_of(path, size), path) for path in prompt_files}
        # An ensemble computes one row per example and prompt, so a batch holds fewer examples.
        dataset = dataclasses.replace(dataset, batch_size=max(dataset.batch_size // len(several), 1))
    elif prompt_file:
        injection = injection_of(prompt_file, size)
        sources = {prompt_file: sources[prompt_file].of(injection)}
    tasks = dataset.eval_batches(tokenizer, say=data_warnings())
    check_labels(tasks, tokenizer)
    check_task_prompts(injection, tasks)
    files = {}
    if submission is None:
        check_labelled(tasks, dataset.split)
    else:
        files = start_submission(submission, tasks, dataset.split)
    partitioner = (
        ONE_DEVICE if several else evaluation_partitioner(size, dataset.batch_size, mesh, num_partitions, base_dtype)
    )
    base = load_base(location, size, base_dtype, partitioner.parameter_sharding)
    for path, source in sources.items():
        source.check(f"prompt {path}", base.fingerprint, tokenizer.fingerprint)
        if (remark := source.remark(f"prompt {path}", base.path)) and is_writer():
            print(remark, file=sys.stderr)
    model = Model(base.path, size, base.params, tokenizer, base.fingerprint, partitioner.gather_table)
    if prompt_text is not None:
        injection = Injection(prompt=written_prompt(prompt_text, model))
    prompts = partitioner.replicate(injection._replace(parameters={}))
    injection = prompts._replace(parameters=partitioner.place(injection.parameters))
    result: dict[str, Any] = {
        "task": dataset.mixture_or_task_name,
        "split": dataset.split,
        "examples": sum(len(batches.examples) for batches in tasks.values()),
        "base": base.path,
        "base_fingerprint": base.fingerprint,
        "prompt": prompt_file if prompt_text is None else prompt_text,
    }
    if several:
        ensemble = Ensemble(size, tokenizer, [*several.values()])
        found = {name: ensemble_result(ensemble, [*several], base.params, one) for name, one in tasks.items()}
        del result["prompt"]
        return write_summary(model_dir, result | (found.popitem()[1] if len(found) == 1 else {"tasks": found}))
    evaluator = Evaluator(size, tokenizer, partitioner)
    if submission is not None:
        predicted = {name: evaluator.predictions(injection.of_task(name), base.params, tasks[name]) for name in files}
        written = [
            write_file(Path(submission), file, name, tasks[name].examples, predicted[name])
            for name, file in files.items()
            if is_writer()
        ]
        return write_summary(model_dir, result | {"submission": written})
    return write_summary(model_dir, result | results_of(evaluator, injection, base.params, tasks, samples))


def results_of(
    evaluator: Evaluator, injection: Injection, frozen: Params, tasks: Mapping[str, Batches], samples: int = 0
) -> dict[str, Any]:
    """Evaluates an injection on each task.

    Args:
      samples: number of right answers, and of wrong answers, of each task to write to stderr.

    Returns:
      For one task, its `task_result`. For several, "tasks", which has the `task_result` of each task by name, and the
      entries of `suite_result`.
    """
    results = {}
    for name, batches in tasks.items():
        own = injection.of_task(name)
        predictions = evaluator.predictions(own, frozen, batches)
        results[name] = task_result(batches, predictions, evaluator.rank_metrics(own, frozen, batches))
        if samples and is_writer():
            show_samples(name, predictions.samples(batches.examples, samples))
    if len(results) == 1:
        return results.popitem()[1]
    return {"tasks": results} | suite_result(results)


def check_task_prompts(injection: Injection, tasks: Iterable[str]) -> None:
    """Raises SettingError if the injection has one prompt per task, but no prompt for one of `tasks`."""
    own = injection.task_prompts
    for task in tasks:
        if own is not None and task not in own:
            raise SettingError(
                f"there is a prompt for each of {', '.join(sorted(own))}, but none for {task}: set ",
                Setting("prompt_file"), " to one of them",
            )  # fmt: skip


def prompt_of(injection: Injection, path: str) -> np.ndarray:
    """Returns the prompt [P, D] of a file for an ensemble.

    Args:
      path: the file or folder that the injection was read from, for the error message.

    Raises:
      SettingError: the injection is not one prompt of shape [P, D] alone.
    """
    if injection.prompt is None or injection.layer_prompts is not None or injection.parameters:
        raise SettingError(
            f"{path} is not a prompt of shape [P, D] alone, which an ensemble needs: set ", Setting("prompt_files")
        )
    return np.asarray(injection.prompt)


def evaluation_partitioner(
    size: T5Config,
    batch_size: int,
    mesh: Mapping[str, int] | None,
    num_partitions: int | None,
    base_dtype: str | None,
) -> Partitioner | OneDevice:
    """Returns the partitioner for an evaluation; the arguments are those of `mesh_choice.partitioner_of`."""

    def resident() -> tuple[int, int]:
        numbers = sum(math.prod(shape) for shape in expected_shapes(size).values())
        dtype = auto_dtype() if base_dtype == "auto" else base_dtype
        return numbers * jnp.dtype(dtype or jnp.float32).itemsize, 0

    return partitioner_of(size, mesh, num_partitions, batch_size, resident)


def write_summary(model_dir: str | None, result: dict[str, Any]) -> dict[str, Any]:
    """Writes the result to summary.json in `model_dir`, if that is given, and returns the result."""
    if model_dir is not None and is_writer():
        Path(model_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(model_dir, "summary.json"), json.dumps(result, indent=1) + "\n")
    return result


def task_result(batches: Batches, predictions: Predictions, ranking: Mapping[str, float] | None) -> dict[str, Any]:
    """Returns the result of one task.

    Args:
      predictions: the answers to the split.
      ranking: the metrics of the labels with the highest log-probabilities; None if the task has no labels.

    Returns:
      A dictionary with

      - "examples": the number of examples
      - "generation": the metrics of the answers by name
      - "score": the mean of these metrics
      - "ranking" and "ranking_score": the same for ranked labels, if the task has labels
      - "no_label": the five most frequent invalid answers, with their counts
      - "no_label_count": the number of all invalid answers
    """
    generation, invalid = predictions.metrics(batches.examples), predictions.no_label()
    result: dict[str, Any] = {
        "examples": len(batches.examples),
        "generation": generation,
        "no_label": dict(invalid.most_common(5)),
        "no_label_count": invalid.total(),
    }
    if ranking is not None:
        result["ranking"] = dict(ranking)
    scores = {"score": task_score(generation), "ranking_score": task_score(ranking or {})}
    return result | {name: value for name, value in scores.items() if value is not None}


def ensemble_result(ensemble: Ensemble, names: Sequence[str], params: Params, batches: Batches) -> dict[str, Any]:
    """Evaluates several prompts and their majority vote on one task, as table 3 of the paper does.

    Args:
      names: the prompts' names, in the ensemble's order.

    Returns:
      "examples", the number of examples; and "generation" and, for a task with labels, "ranking". Each of these two has
      "average", the mean of each metric over the prompts; "best", the metrics and the name of the prompt with the
      highest score; "ensemble", the metrics of the majority vote; and "prompts", the metrics of each prompt by name.

    Raises:
      SettingError: the task's metrics take scores, on which no vote is possible.
    """
    if takes_scores(batches.examples):
        raise SettingError(
            "prompts cannot be ensembled on a task whose metrics take scores, because it has no answers to vote on: "
            "set ",
            Setting("mixture_or_task_name"),
            " to the same task without rank_classification, which also ranks the labels",
        )  # fmt: skip
    votes = {"generation": ensemble.generated(params, batches), "ranking": ensemble.ranked(params, batches)}
    return {"examples": len(batches.examples)} | {
        source: vote_result(batches, each, names) for source, each in votes.items() if each is not None
    }


def vote_result(batches: Batches, votes: Votes, names: Sequence[str]) -> dict[str, Any]:
    """Returns the metrics of each prompt, their average, the best prompt's and the majority vote's."""
    each = [postprocess(batches.examples, texts).metrics(batches.examples) for texts in votes.texts]
    best = max(range(len(names)), key=lambda index: task_score(each[index]) or 0.0)
    return {
        "average": {metric: float(np.mean([values[metric] for values in each])) for metric in each[0]},
        "best": each[best] | {"prompt": names[best]},
        "ensemble": postprocess(batches.examples, votes.majority()).metrics(batches.examples),
        "prompts": dict(zip(names, each, strict=True)),
    }


def suite_result(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns "score" and "ranking_score", the means of the tasks' scores.

    "ranking_score" is left out if a task has a score, but no score by ranking.
    """
    scored = {name: result for name, result in results.items() if "score" in result}
    means = {
        name: suite_score({task: result.get(name) for task, result in scored.items()})
        for name in ("score", "ranking_score")
        if all(name in result for result in scored.values())
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def check_labelled(tasks: Mapping[str, Batches], split: str) -> None:
    """Raises SettingError if a task has no labelled row, as in the test splits of the benchmarks."""
    for name, batches in tasks.items():
        fields = batches.examples.fields
        if all(row.get("targets_pretokenized") == UNLABELLED or row.get("label") == -1 for row in fields):
            raise SettingError(
                f"{split} of {name} has no labels to score: set ", Setting("eval_split"), " to a split that has, or "
                "write what a benchmark's server takes with --submission=DIR",
            )  # fmt: skip


def show_samples(task: str, samples: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Writes the prediction, targets and inputs of each sample to stderr."""
    for kind, rows in samples.items():
        for row in rows:
            line = " ".join(f"{name} {row[name]!r}" for name in ("prediction", "targets", "inputs"))
            print(f"{task}, {kind}: {line}", file=sys.stderr)


def check_prompt_files(
    prompt_file: str | None, prompt_files: Sequence[str] | None, prompt_text: str | None, submission: str | None
) -> None:
    """Raises SettingError if the settings name nothing to evaluate, or more than one thing."""
    one, many, words = Setting("prompt_file"), Setting("prompt_files"), Setting("prompt_text")
    given = {one: prompt_file, many: prompt_files, words: prompt_text}
    twice = [name for name, value in given.items() if value]
    if len(twice) > 1:
        raise SettingError(twice[0], " and ", twice[1], " are both set: set one of them")
    if prompt_files is not None and len(set(prompt_files)) < 2:
        raise SettingError(many, f" names {len(set(prompt_files))} prompts, expected two or more to ensemble")
    if prompt_files and submission is not None:
        raise SettingError("--submission writes the answers of one prompt: set ", one, ", not ", many)
    if prompt_file == "" and not twice:
        raise SettingError(
            one, " must be set: a prompt, or None for the base model alone; or ", many, ", an ensemble; or ", words,
            ", a prompt in words",
        )  # fmt: skip

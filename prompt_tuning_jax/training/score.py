"""Scoring a finished prompt on a split: by generation, and by ranking the labels where they are a closed set."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.checkpoints.base import auto_dtype, expected_shapes, load_base, open_vocabulary
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.inference.ensembling import Ballots, Ensemble
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import is_writer
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.files import read_prompt
from prompt_tuning_jax.prompts.module import SoftPrompt
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import embedding_table
from prompt_tuning_jax.tasks.metrics import suite_score, task_score
from prompt_tuning_jax.tasks.postprocessors import UNLABELLED
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.evaluation import Evaluator, Judged, check_labels, judge, takes_scores
from prompt_tuning_jax.training.layout import partitioner_of
from prompt_tuning_jax.training.run_folder import check_writable, write_text
from prompt_tuning_jax.training.step import PROMPT
from prompt_tuning_jax.training.submission import start_submission, write_file


def evaluate_prompt(
    *,
    model: Transformer,
    initial_checkpoint_path: str,
    dataset: DatasetConfig,
    prompt_file: str | None = None,
    prompt_files: Sequence[str] | None = None,
    prompt_text: str | None = None,
    vocabulary: str | None = None,
    base_dtype: str | None = "auto",
    num_partitions: int | None = None,
    mesh: Mapping[str, int] | None = None,
    samples: int = 0,
    submission: str | None = None,
    model_dir: str | None = None,
) -> dict[str, Any]:
    """The metrics of a task, or of each task of a mixture, in per cent; or a submission in their place.

    Args:
      model: without a `prompt_factory`: the prompt brings its own length.
      prompt_file: a prompt of this base; None for the base as it is.
      prompt_files: several, which are scored each and as an ensemble (section 6).
      prompt_text: a prompt in words, whose pieces are put before each row's inputs (prompt design).
      vocabulary: None for the one beside the base.
      base_dtype: of the base in memory; see `checkpoints.base.load_base`.
      num_partitions, mesh: the mesh, as of `run.TrainConfig`; of several prompts one device answers alone.
      samples: how many right and how many wrong answers of each task to show on stderr.
      submission: a folder for the files that a benchmark's server scores; nothing is scored here.
      model_dir: a folder for summary.json, what is returned; None to leave nothing.

    Returns:
      Of one task, what `task_result` gives. Of several, "tasks": that by name; "score", the mean of their scores, and
      "ranking_score", where all of them can be ranked. Of a submission, "submission": what `submission.write` gives.
      Of several prompts, `ensemble_result` in place of `task_result`.

    Raises:
      ValueError: something does not fit; the message says what to set.
    """
    check_prompt_files(prompt_file, prompt_files, prompt_text, submission)
    if model_dir is not None:
        check_writable(Path(model_dir))
    words = open_vocabulary(vocabulary, initial_checkpoint_path, model.config)
    prompts, several = {}, {}
    if prompt_files:
        several = {path: read_fitting(path, model) for path in prompt_files}
        # An example is as many rows as there are prompts.
        dataset = dataclasses.replace(dataset, batch_size=max(dataset.batch_size // len(several), 1))
    elif prompt_file:
        prompt = read_fitting(prompt_file, model)
        prompts[PROMPT] = jnp.asarray(prompt)
        model = model.clone(prompt_factory=functools.partial(SoftPrompt, length=prompt.shape[0]))
    tasks = dataset.eval_batches(words)
    check_labels(tasks, words)
    if submission is None:
        check_labelled(tasks, dataset.split)
    else:
        files = start_submission(submission, tasks, dataset.split)
    partitioner = (
        None if several else evaluation_partitioner(model.config, dataset.batch_size, mesh, num_partitions, base_dtype)
    )
    place = None if partitioner is None else partitioner.parameter
    base = load_base(initial_checkpoint_path, model.config, base_dtype, place)
    if prompt_text is not None:
        table = embedding_table(base.params) if partitioner is None else partitioner.gather_table(base.params)
        prompt = written_prompt(prompt_text, table, words)
        prompts[PROMPT] = prompt
        model = model.clone(prompt_factory=functools.partial(SoftPrompt, length=prompt.shape[0]))
    if partitioner is not None:
        prompts = partitioner.replicate(prompts)
    evaluator = Evaluator(model, words, partitioner)
    result: dict[str, Any] = {
        "task": dataset.mixture_or_task_name,
        "split": dataset.split,
        "examples": sum(len(batches.examples) for batches in tasks.values()),
        "base_fingerprint": base.fingerprint,
        "prompt": prompt_file if prompt_text is None else prompt_text,
    }
    if several:
        ensemble = Ensemble(model, words, [*several.values()])
        found = {name: ensemble_result(ensemble, [*several], base.params, one) for name, one in tasks.items()}
        del result["prompt"]
        return left(model_dir, result | (found.popitem()[1] if len(found) == 1 else {"tasks": found}))
    if submission is not None:
        predicted = {name: evaluator.judged(prompts, base.params, tasks[name]) for name in files}
        written = [
            write_file(Path(submission), file, name, tasks[name].examples, predicted[name])
            for name, file in files.items()
            if is_writer()
        ]
        return left(model_dir, result | {"submission": written})
    results = {}
    for name, batches in tasks.items():
        found = evaluator.judged(prompts, base.params, batches)
        ranking = evaluator.rank_metrics(prompts, base.params, batches)
        results[name] = task_result(batches, found, ranking)
        if samples and is_writer():
            show_samples(name, found.samples(batches.examples, samples))
    if len(results) == 1:
        return left(model_dir, result | results.popitem()[1])
    return left(model_dir, result | {"tasks": results} | suite_result(results))


def evaluation_partitioner(
    size: T5Config,
    batch_size: int,
    mesh: Mapping[str, int] | None,
    num_partitions: int | None,
    base_dtype: str | None,
) -> Partitioner | None:
    """Of the mesh that an evaluation takes; None on one device."""

    def resident() -> tuple[int, int]:
        numbers = sum(math.prod(shape) for shape in expected_shapes(size).values())
        held = auto_dtype() if base_dtype == "auto" else base_dtype
        return numbers * jnp.dtype(held or jnp.float32).itemsize, 0

    return partitioner_of(size, mesh, num_partitions, batch_size, resident)


def left(model_dir: str | None, result: dict[str, Any]) -> dict[str, Any]:
    """The result, which is then also in summary.json of a folder."""
    if model_dir is not None and is_writer():
        Path(model_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(model_dir, "summary.json"), json.dumps(result, indent=1) + "\n")
    return result


def task_result(batches: Batches, found: Judged, ranking: Mapping[str, float] | None) -> dict[str, Any]:
    """What is said of one task.

    Args:
      ranking: its metrics by ranking the labels, where it has labels.

    Returns:
      "examples"; "generation" and, for a task with labels, "ranking": metrics by name; "score" and "ranking_score", the
      means of these; "no_label_count", how many answers are no label, and "no_label", the commonest of them.
    """
    generation, odd = found.metrics(batches.examples), found.no_label()
    result: dict[str, Any] = {
        "examples": len(batches.examples),
        "generation": generation,
        "no_label": dict(odd.most_common(5)),
        "no_label_count": odd.total(),
    }
    if ranking is not None:
        result["ranking"] = dict(ranking)
    scores = {"score": task_score(generation), "ranking_score": task_score(ranking or {})}
    return result | {name: value for name, value in scores.items() if value is not None}


def ensemble_result(
    ensemble: Ensemble, names: Sequence[str], params: Mapping[str, jax.Array], batches: Batches
) -> dict[str, Any]:
    """What is said of one task and several prompts: table 3 of the paper.

    Returns:
      "examples"; "generation" and, for a task with labels, "ranking", each with "average", the mean of each metric over
      the prompts; "best", the metrics of the prompt of the highest score, and its name; "ensemble", those of the vote;
      and "prompts", the metrics of each by name.
    """
    if takes_scores(batches.examples):
        raise ValueError(
            "a task whose metrics take scores has no answers to vote on: set MIXTURE_OR_TASK_NAME to the task without "
            "rank_classification, whose labels are ranked as well"
        )
    ballots = {"generation": ensemble.generated(params, batches), "ranking": ensemble.ranked(params, batches)}
    return {"examples": len(batches.examples)} | {
        how: ballot_result(batches, found, names) for how, found in ballots.items() if found is not None
    }


def ballot_result(batches: Batches, found: Ballots, names: Sequence[str]) -> dict[str, Any]:
    """The columns of table 3, of one way to answer."""
    each = [judge(batches.examples, texts).metrics(batches.examples) for texts in found.texts]
    best = max(range(len(names)), key=lambda at: task_score(each[at]) or 0.0)
    return {
        "average": {metric: float(np.mean([values[metric] for values in each])) for metric in each[0]},
        "best": each[best] | {"prompt": names[best]},
        "ensemble": judge(batches.examples, found.elected()).metrics(batches.examples),
        "prompts": dict(zip(names, each, strict=True)),
    }


def suite_result(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The means of the tasks' scores; by ranking only where all tasks with a score have one by ranking."""
    scored = {name: result for name, result in results.items() if "score" in result}
    means = {
        name: suite_score({task: result.get(name) for task, result in scored.items()})
        for name in ("score", "ranking_score")
        if all(name in result for result in scored.values())
    }
    return {name: mean for name, mean in means.items() if mean is not None}


def check_labelled(tasks: Mapping[str, Batches], split: str) -> None:
    """Raises ValueError where no row of a task has a label, as in the benchmarks' test splits."""
    for name, batches in tasks.items():
        fields = batches.examples.fields
        if all(row.get("targets_pretokenized") == UNLABELLED or row.get("label") == -1 for row in fields):
            raise ValueError(
                f"{split} of {name} has no labels to score: set EVAL_SPLIT to a split that has, or write what a "
                "benchmark's server takes with --submission=DIR"
            )


def show_samples(task: str, samples: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    """Says on stderr what was asked, answered and right."""
    for kind, rows in samples.items():
        for row in rows:
            line = " ".join(f"{name} {row[name]!r}" for name in ("prediction", "targets", "inputs"))
            print(f"{task}, {kind}: {line}", file=sys.stderr)


def written_prompt(text: str, embeddings: Float[Array, "V D"], vocabulary: Vocabulary) -> Float[Array, "n D"]:
    """The prompt whose n positions are the pieces of a text: before the inputs it is that text."""
    shape = (max(len(vocabulary.encode(text)), 1), embeddings.shape[1])
    return initializers.string(jax.random.key(0), shape, embeddings=embeddings, encode=vocabulary.encode, text=text)


def check_prompt_files(
    prompt_file: str | None, prompt_files: Sequence[str] | None, prompt_text: str | None, submission: str | None
) -> None:
    """Raises ValueError where it is not said what to score, or said twice."""
    if isinstance(prompt_files, str):
        raise ValueError(f"PROMPT_FILES is {prompt_files!r}, expected a list of files: set PROMPT_FILE for one")
    given = {"PROMPT_FILE": prompt_file, "PROMPT_FILES": prompt_files, "PROMPT_TEXT": prompt_text}
    twice = [name for name, value in given.items() if value]
    if len(twice) > 1:
        raise ValueError(f"{' and '.join(twice)} are both set: set one of them")
    if prompt_files is not None and len(set(prompt_files)) < 2:
        raise ValueError(f"PROMPT_FILES names {len(set(prompt_files))} prompts, expected two or more to ensemble")
    if prompt_files and submission is not None:
        raise ValueError("--submission writes the answers of one prompt: set PROMPT_FILE, not PROMPT_FILES")
    if prompt_file == "" and not twice:
        raise ValueError(
            "PROMPT_FILE must be set: a prompt, or None for the base alone; or PROMPT_FILES, an ensemble; or "
            "PROMPT_TEXT, a prompt in words"
        )


def read_fitting(path: str, model: Transformer) -> Float[np.ndarray, "P D"]:
    """The prompt in a file, of the model's width."""
    prompt = read_prompt(path)
    check_width(path, prompt.shape, model.config.emb_dim)
    return prompt


def check_width(path: str, shape: tuple[int, ...], d_model: int) -> None:
    """Raises ValueError where a prompt was trained on another model size."""
    if shape[1] != d_model:
        raise SettingError(
            f"prompt {path} is [{shape[0]}, {shape[1]}], but the base has d_model {d_model}: "
            "it was trained on another model size. Set ",
            Setting("initial_checkpoint_path"),
            " to the base it was trained on",
        )

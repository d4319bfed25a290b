"""`train` and `evaluate` as a notebook calls them: rows in memory or tasks, no gin, and no file unless one is named."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from prompt_tuning_jax.batches.data import Data, dataset_of, default_lengths
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import fingerprint
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.checkpoints.trained_on import TrainedOn, trained_on
from prompt_tuning_jax.checkpoints.tuned import adapters_alone, injection_of, write_adapters, write_prompts
from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.methods.method import Injection, Method, tasks_of
from prompt_tuning_jax.methods.task_prompts import with_tasks
from prompt_tuning_jax.settings import (
    Callback,
    Count,
    Lengths,
    Seed,
    Share,
    Switch,
    Texts,
    accepts,
    as_path,
    check,
    shown,
)
from prompt_tuning_jax.t5.adapters import merged
from prompt_tuning_jax.training.eval_run import check_labelled, check_task_prompts, results_of
from prompt_tuning_jax.training.evaluation import Evaluator, check_labels
from prompt_tuning_jax.training.loop import train as train_run
from prompt_tuning_jax.training.optimizer import adafactor
from prompt_tuning_jax.training.run import TrainConfig, check_run
from prompt_tuning_jax.training.run_folder import kept_eval_period


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run came to, at its best evaluation.

    Attributes:
      model: the base model.
      injection: what it runs with.
      prompts: by task, [P, D] each, if the method trains one prompt per task; else empty.
      metrics: of that evaluation, in per cent, by name.
      trainable_parameters: how many numbers were trained.
      summary: what a run's folder has in summary.json.
    """

    model: Model
    injection: Injection
    metrics: dict[str, float]
    trainable_parameters: int
    summary: dict[str, Any]

    @property
    def prompt(self) -> Float[np.ndarray, "P D"] | Float[np.ndarray, "L P D"] | None:
        """The prompt, [P, D], or [L, P, D] of prompts per layer; None if the method gives none.

        Additions per layer to a prompt are in `injection.layer_prompts`.

        Raises:
          ValueError: there are several, one per task.
        """
        if self.prompts:
            raise ValueError(f"there is a prompt for each of {', '.join(self.prompts)}: take `prompts`, by task")
        prompt = self.injection.prompt if self.injection.prompt is not None else self.injection.layer_prompts
        return None if prompt is None else np.asarray(prompt)

    @property
    def prompts(self) -> dict[str, Float[np.ndarray, "P D"]]:
        return {task: np.asarray(prompt) for task, prompt in (self.injection.task_prompts or {}).items()}

    def merged(self) -> Model:
        """Returns a model of its own with the trained parameters in place of the base model's.

        A prefix of keys and values stays beside them.
        """
        if not self.injection.parameters:
            raise ValueError("the method trained a prompt, which is no part of a model's parameters")
        changed = {path: jnp.asarray(value) for path, value in self.injection.parameters.items()}
        parameters = merged(changed, self.model.parameters)
        own = fingerprint(parameters, self.model.config)
        return dataclasses.replace(self.model, path=None, parameters=parameters, fingerprint=own)

    def save(self, path: str | os.PathLike, *, merge: bool = False) -> None:
        """Writes what was trained, whole or not at all.

        A prompt becomes a `.npy` file, a prompt with additions per layer a folder of two, and prompts per task a folder
        of such files, TASK.npy. A tuned model becomes a folder that `transformers` loads. LoRA, IA3 and a prefix of the
        decoder become a folder that `peft` loads; a prefix of the encoder, which PEFT does not know, becomes a folder
        that this project alone reads.

        Args:
          merge: write LoRA and IA3 merged into the model, as a folder that `transformers` loads.
        """
        parameters = self.injection.parameters
        if self.injection.length and not parameters:
            write_prompts(path, self.injection)
        elif adapters_alone(parameters) and not merge:
            write_adapters(path, self.injection, self.model.config, self.model.path)
        else:
            model = self.merged()
            huggingface.write(Path(path), model.config, model.parameters, model.tokenizer.path)


# The fields of `TrainConfig` that `train` sets, with the arguments that it sets them from.
FIELDS_OF_ARGUMENTS = {
    "train_steps": "steps",
    "log_period": "log_every",
    "eval_period": "eval_every",
    "random_seed": "seed",
    "model_dir": "folder",
    "train_dataset": "train",
    "eval_dataset": "validation",
    "size": "model",
    "initial_checkpoint_path": "model",
    "vocabulary": "model",
    "base_dtype": "model",
}


def train(
    model: Model | Any,
    method: Method | Any,
    train: Any,
    validation: Any,
    *,
    steps: Count,
    optimizer: optax.GradientTransformation | Any = None,
    batch_size: Count = 32,
    labels: Texts | Mapping[str, Sequence[str] | None] | None = None,
    metrics: Texts | Mapping[str, Sequence[str] | None] | None = None,
    lengths: Lengths | None = None,
    eval_every: Count | None = None,
    eval_batch_size: Count = 128,
    log_every: Count = 50,
    seed: Seed = 0,
    dropout_rate: Share = 0.0,
    folder: str | os.PathLike | Any = None,
    on_record: Callback = lambda record: None,
    progress: Switch = True,
    **more: Any,
) -> Result:
    """Trains what a method trains on a frozen model.

    Args:
      model: of `load`; it is not changed.
      method: what is trained, `PromptTuning(length=100)` for instance.
      train, validation: rows, a sequence of `{"inputs": text, "targets": text}`; or a `task` or `files`, whose splits
        of these names are taken unless one is chosen, `data["train[:-500]"]`; or several of these by their tasks'
        names, `{"sst2": rows, "mrpc": rows}`: each task is drawn in proportion to its rows, and evaluated by itself.
      steps: updates in all.
      optimizer: of optax. None for the paper's Adafactor at learning rate 0.3, which is meant for prompts.
      batch_size: rows per update.
      labels: the answers, if they are a closed set; they are then ranked, too. Of several tasks they may be given for
        each, by its name.
      metrics: by name; None for accuracy. Of several tasks the same.
      lengths: the most tokens of "inputs" and "targets", end of sequence included; longer rows are truncated. None for
        512 and the longest target.
      eval_every: updates between two evaluations; None for ten in all, or for the period of the run that is extended.
      eval_batch_size: rows per evaluation batch.
      log_every: updates between two records of the training loss.
      seed: of the start, the order of the rows and dropout.
      dropout_rate: of the frozen model while training; the official runs train with 0.1.
      folder: for checkpoints, metrics and the best prompt. The same call resumes the run that is there; another one
        raises ValueError. None to write nothing.
      on_record: is called with each record of losses or metrics, a dictionary, as it is made.
      progress: whether to show a progress bar.
      more: further fields of `training.run.TrainConfig`: early_stop_evals, keep_checkpoints, num_microbatches, z_loss,
        num_partitions, mesh, ...

    Returns:
      The result at the best evaluation.

    Raises:
      ValueError: something does not fit, said before the first step; or the loss is not finite.

    Example:

        model = pt.load("nano")
        rows = [{"inputs": "sentence: a joy", "targets": "positive"}, ...]
        result = pt.train(model, pt.PromptTuning(20), rows, rows, steps=100, labels=["negative", "positive"])
        result.save("prompt.npy")
    """
    check_model(model)
    for name in more:
        if name in FIELDS_OF_ARGUMENTS:
            raise SettingError(f"`{name}` is no argument of `train`: set ", Setting(FIELDS_OF_ARGUMENTS[name]))
    arguments: dict[str, Any] = {
        "method": method,
        "optimizer": adafactor(0.3) if optimizer is None else optimizer,
        "train_steps": steps,
        "log_period": log_every,
        "random_seed": seed,
        "model_dir": as_path(folder),
        **more,
    }
    check_run(arguments | ({} if eval_every is None else {"eval_period": eval_every}))
    size = dataclasses.replace(model.config, dropout_rate=dropout_rate)
    check_batches(batch_size, lengths)
    with renamed(batch_size="eval_batch_size"):
        check_batches(eval_batch_size, lengths)
    check_texts(labels=labels, metrics=metrics)
    check("on_record", on_record, Callback)
    check("progress", progress, Switch)
    if lengths is None:
        lengths = default_lengths(train, validation, model.tokenizer, labels)
    if eval_every is None:
        eval_every = None if folder is None else kept_eval_period(folder)
    arguments["eval_period"] = max(steps // 10, 1) if eval_every is None else eval_every
    scored = {"labels": labels, "metrics": metrics, "lengths": lengths}
    train_dataset = dataset_of(train, "train", batch_size=batch_size, **scored)
    tasks = tasks_of(method)
    if accepts(tasks, Texts) and not tasks:
        arguments["method"] = with_tasks(method, train_dataset.load(model.tokenizer, to_train=True, say=warn))
    config = TrainConfig(
        size=size,
        initial_checkpoint_path=model.path or "",
        model=model,
        train_dataset=train_dataset,
        eval_dataset=dataset_of(validation, "validation", batch_size=eval_batch_size, **scored),
        **arguments,
    )
    config.check()
    if optimizer is None and config.trains_parameters:
        raise SettingError(
            Setting("optimizer"),
            f" must be given for {type(method).__name__}: the default's learning rate of 0.3 is meant for prompts",
        )
    run = train_run(config, say=None, on_record=on_record, warn=warn, progress=progress)
    summary = run.summary
    return Result(model, run.best_injection, summary["best"], summary["trainable_parameters"], summary)


def evaluate(
    model: Model | Any,
    data: Any,
    *,
    prompt: Any = None,
    labels: Texts | Mapping[str, Sequence[str] | None] | None = None,
    metrics: Texts | Mapping[str, Sequence[str] | None] | None = None,
    lengths: Lengths | None = None,
    batch_size: Count = 128,
) -> dict[str, Any]:
    """Returns the metrics of a model on data, in per cent.

    Args:
      model: of `load`.
      data: as of `train`; the split "validation" of a task or of files, unless one is chosen.
      prompt: an array, [P, D] or [L, P, D]; prompts by task; a path of a prompt, an adapter or a run's folder; a
        `Result`, or its `injection`; None for the model alone.
      labels, metrics, lengths: as of `train`.
      batch_size: rows per batch.

    Returns:
      The metrics of the generated answers by name, "accuracy" for instance; "ranking", the metrics if the answer is the
      label of the highest score, for data with labels; "examples"; "no_label", the commonest answers that are no label,
      and "no_label_count". For a mixture of several tasks, "tasks", that by name, and "score".

    Raises:
      ValueError: something does not fit.

    Example:

        pt.evaluate(model, rows, prompt="prompt.npy", labels=["negative", "positive"])["accuracy"]
    """
    check_model(model)
    check_batches(batch_size, lengths)
    check_texts(labels=labels, metrics=metrics)
    if lengths is None:
        chosen = data["validation"] if isinstance(data, Data) and data.split is None else data
        lengths = default_lengths(chosen, chosen, model.tokenizer, labels)
    scored = {"labels": labels, "metrics": metrics, "lengths": lengths}
    dataset = dataset_of(data, "validation", batch_size=batch_size, **scored)
    source, what = TrainedOn(), "the prompt"
    if isinstance(prompt, (str, os.PathLike)):
        source, what = trained_on(prompt), f"prompt {prompt}"
    elif isinstance(prompt, Result):
        source = TrainedOn(prompt.model.fingerprint, prompt.model.tokenizer.fingerprint)
    given = prompt.injection if isinstance(prompt, Result) else prompt
    injection = Injection() if given is None else injection_of(given, model.config)
    source = source.of(injection)
    source.check(what, model.fingerprint, model.tokenizer.fingerprint)
    if remark := source.remark(what, model.path):
        warn(remark)
    tasks = dataset.eval_batches(model.tokenizer, say=warn)
    check_labels(tasks, model.tokenizer)
    check_task_prompts(injection, tasks)
    check_labelled(tasks, dataset.split)
    found = results_of(Evaluator(model.config, model.tokenizer), injection, dict(model.parameters), tasks)
    if "tasks" in found:
        return found | {"tasks": {name: _flat(one) for name, one in found["tasks"].items()}}
    return _flat(found)


def check_model(model: Any) -> None:
    """Raises SettingError if this is no base model."""
    if not isinstance(model, Model):
        hint = f"; did you mean pt.load({model!r})?" if isinstance(model, str) else ""
        raise SettingError(Setting("model"), f" is {shown(model)}, expected a base model of `load`{hint}")


def check_batches(batch_size: Any, lengths: Any) -> None:
    """Raises SettingError if a batch cannot be of so many rows, or of rows of these lengths."""
    check("batch_size", batch_size, Count)
    check("task_feature_lengths", lengths, Lengths | None)


def check_texts(**settings: Any) -> None:
    """Raises SettingError if labels or metrics, of all tasks or by task, are no lists of texts."""
    for name, given in settings.items():
        for one in given.values() if isinstance(given, Mapping) else [given]:
            check(name, one, Texts | None)


def _flat(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's result with its generated answers' metrics by name."""
    rest = {name: value for name, value in result.items() if name not in ("generation", "score", "ranking_score")}
    return {**result["generation"], **rest}


def warn(line: str) -> None:
    """Warns of what of the data does not fit, at the caller's own line of code."""
    warnings.warn(line, stacklevel=3)

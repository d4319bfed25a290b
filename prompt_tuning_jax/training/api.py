"""Defines `train` and `evaluate` for Python: they take rows in memory, files or tasks, and need no gin.

They write no file unless the caller names a folder or a path.
"""

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
from prompt_tuning_jax.checkpoints.tuned import has_only_adapters, injection_of, write_adapters, write_prompts
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
from prompt_tuning_jax.training.run_folder import recorded_eval_period


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Holds what a run trained, as it was at the best evaluation.

    Attributes:
      model: the base model.
      injection: what the base model runs with: the trained prompts or parameters.
      prompts: one prompt [P, D] per task, by the task's name, if the method trains one per task; otherwise empty.
      metrics: the metrics of the best evaluation by name, in per cent. With several tasks, the names are "task/metric".
        A task without metrics has its loss, in nats per target token.
      trainable_parameters: the number of trained values.
      summary: what summary.json has in a run's folder. It is also set if the run has no folder.
    """

    model: Model
    injection: Injection
    metrics: dict[str, float]
    trainable_parameters: int
    summary: dict[str, Any]

    @property
    def prompt(self) -> Float[np.ndarray, "P D"] | Float[np.ndarray, "L P D"] | None:
        """The prompt: [P, D], or [L, P, D] if there is one per encoder layer. None if the method gives no prompt.

        If the layers add to a prompt, the additions are in `injection.layer_prompts`.

        Raises:
          ValueError: there is one prompt per task; see `prompts`.
        """
        if self.prompts:
            raise ValueError(f"there is a prompt for each of {', '.join(self.prompts)}: take `prompts`, by task")
        prompt = self.injection.prompt if self.injection.prompt is not None else self.injection.layer_prompts
        return None if prompt is None else np.asarray(prompt)

    @property
    def prompts(self) -> dict[str, Float[np.ndarray, "P D"]]:
        return {task: np.asarray(prompt) for task, prompt in (self.injection.task_prompts or {}).items()}

    def merged(self) -> Model:
        """Returns a new model in which the trained parameters are merged into the base model's or replace them.

        A learned prefix of keys and values cannot be merged: the new model has it as parameters of its own.

        Raises:
          ValueError: the method trained only a prompt, or the parameters to merge into are int8.
        """
        if not self.injection.parameters:
            raise ValueError("the method trained a prompt, which is no part of a model's parameters")
        changed = {path: jnp.asarray(value) for path, value in self.injection.parameters.items()}
        parameters = merged(changed, self.model.parameters)
        own = fingerprint(parameters, self.model.config)
        return dataclasses.replace(self.model, path=None, parameters=parameters, fingerprint=own)

    def save(self, path: str | os.PathLike, *, merge: bool = False) -> None:
        """Writes what was trained. The write is atomic: `path` never holds part of a result.

        What `path` becomes depends on what was trained:

        - a prompt, or prompts per layer: a `.npy` file
        - a prompt with additions per layer: a folder of two `.npy` files
        - prompts per task: a folder with a file TASK.npy per task
        - the model's own parameters: a folder that `transformers` loads
        - LoRA, IA3 or a decoder prefix: a folder that `peft` loads
        - an encoder prefix, which PEFT does not have: a folder that only this project reads

        Args:
          path: the file or folder to write.
          merge: whether to write LoRA and IA3 merged into the model, as a folder that `transformers` loads.
        """
        parameters = self.injection.parameters
        if self.injection.length and not parameters:
            write_prompts(path, self.injection)
        elif has_only_adapters(parameters) and not merge:
            write_adapters(path, self.injection, self.model.config, self.model.path)
        else:
            model = self.merged()
            huggingface.write(Path(path), model.config, model.parameters, model.tokenizer.path)


# The fields of `TrainConfig` that `train` sets, and the argument that each is set from.
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
    """Trains a prompt, an adapter or the whole model, as `method` defines, and returns the best result.

    Args:
      model: a base model from `load`. It is not changed.
      method: what is trained, such as `PromptTuning(length=100)`.
      train, validation: the data: rows, which are a sequence of `{"inputs": text, "targets": text}`; a `task`; or
        `files`. A task and files give their splits "train" and "validation", unless another split is chosen, as in
        `data["train[:-500]"]`. For several tasks, a dictionary of such data by task name, as in
        `{"sst2": rows, "mrpc": rows}`. Training then draws from the tasks in proportion to their rows, and each task is
        evaluated separately.
      steps: number of updates.
      optimizer: an optax optimiser. None for the paper's Adafactor at learning rate 0.3, which is meant for prompts.
      batch_size: rows per update.
      labels: the possible answers, if they are a closed set. A SeqIO task has its own. With several tasks, either one
        list for all tasks, or a dictionary with a list, or None, for each task name.
      metrics: names of metrics; None for accuracy. With several tasks, either one list or a dictionary, like `labels`.
      lengths: the largest number of tokens of "inputs" and of "targets", end of sequence included. Longer rows are
        truncated. None for 512 tokens of inputs and enough for the longest target.
      eval_every: updates between two evaluations. None for the period of the run that is in `folder` already, or, if
        there is none, for a tenth of `steps`.
      eval_batch_size: rows per evaluation batch.
      log_every: updates between two records of the training loss.
      seed: determines the initial parameters, the order of the rows and the dropout masks.
      dropout_rate: dropout of the frozen model during training; the official runs use 0.1.
      folder: a folder for checkpoints, metrics and the best prompt; None to write nothing. The same call again resumes
        the run in the folder, and a call with more steps extends it. A call for another run raises ValueError.
      on_record: called with each record of losses or metrics, a dictionary, when it is logged.
      progress: whether to show a progress bar.
      more: other fields of `training.run.TrainConfig`: early_stop_evals, keep_checkpoints, num_microbatches, z_loss,
        num_partitions, mesh, ...

    Returns:
      The result at the best evaluation.

    Raises:
      ValueError: a setting or the data is invalid, which is reported before the first step; or the loss is not finite.

    Example:

        model = pt.load("nano")
        rows = [{"inputs": "sentence: a joy", "targets": "positive"}, ...]
        result = pt.train(model, pt.PromptTuning(20), rows, rows, steps=100, labels=["negative", "positive"])
        result.save("prompt.npy")
    """
    check_model(model)
    for name in more:
        if name in FIELDS_OF_ARGUMENTS:
            raise SettingError(f"`{name}` is not an argument of `train`: set ", Setting(FIELDS_OF_ARGUMENTS[name]))
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
        eval_every = None if folder is None else recorded_eval_period(folder)
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
      model: a base model from `load`.
      data: the data, in a form that `train` takes. If no split of a task or of files is chosen, it is "validation".
      prompt: an array, [P, D] or [L, P, D]; a dictionary of arrays by task name; the path of a prompt, of an adapter or
        of a run's folder; a `Result` or its `injection`; or None for the base model alone.
      labels, metrics, lengths: as in `train`.
      batch_size: rows per batch.

    Returns:
      A dictionary with the metrics of the generated answers by name, such as "accuracy", and with

      - "ranking", if the data has labels: the metrics if each answer is the label with the highest log-probability
      - "examples": the number of examples
      - "no_label": the five most frequent answers that are not a label, and how often each was given
      - "no_label_count": the number of all answers that are not a label

      For several tasks, a dictionary with "tasks", which has such a dictionary for each task by name, and with "score"
      and "ranking_score", the means of the tasks' scores.

    Raises:
      ValueError: a setting, the data or the prompt is invalid, or they do not belong together.

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
    """Raises SettingError if `model` is not a base model."""
    if not isinstance(model, Model):
        hint = f"; did you mean pt.load({model!r})?" if isinstance(model, str) else ""
        raise SettingError(Setting("model"), f" is {shown(model)}, expected a base model of `load`{hint}")


def check_batches(batch_size: Any, lengths: Any) -> None:
    """Raises SettingError if the number of rows of a batch or the lengths of the rows are invalid."""
    check("batch_size", batch_size, Count)
    check("task_feature_lengths", lengths, Lengths | None)


def check_texts(**settings: Any) -> None:
    """Raises SettingError if a setting is neither None, a list of texts, nor a mapping of these by task name."""
    for name, given in settings.items():
        for one in given.values() if isinstance(given, Mapping) else [given]:
            check(name, one, Texts | None)


def _flat(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a task's result without its scores, and with the metrics under "generation" moved to the top level."""
    rest = {name: value for name, value in result.items() if name not in ("generation", "score", "ranking_score")}
    return {**result["generation"], **rest}


def warn(line: str) -> None:
    """Issues a warning about the data, which Python shows with a line of code of the caller."""
    warnings.warn(line, stacklevel=3)

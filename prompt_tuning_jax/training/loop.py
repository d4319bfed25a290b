"""The training run, as a recipe: read everything, then step, evaluate, save, and at the end say what came out."""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batches
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import fingerprint, load_base, open_vocabulary, random_base
from prompt_tuning_jax.prompts.files import write_prompt
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.tasks.metrics import suite_score, task_score
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.evaluation import Evaluator, check_labels
from prompt_tuning_jax.training.progress import Terminated, Window, prompt_metrics, say
from prompt_tuning_jax.training.run_folder import RunFolder, write_text
from prompt_tuning_jax.training.start import check_prompt_length, start_prompt
from prompt_tuning_jax.training.step import PROMPT, Params, TrainState, make_train_step, split_trainable

TERMINATED = 143  # exit code after SIGTERM: saved, to be started again


def train(
    *,
    model_dir: str,
    model: Transformer,
    initial_checkpoint_path: str | None,
    train_dataset: DatasetConfig,
    eval_dataset: DatasetConfig,
    trainable: Sequence[str],
    optimizer: optax.GradientTransformation,
    train_steps: int,
    eval_period: int,
    prompt_init: Callable[..., jax.Array] | None = None,
    prompt_length: int = 0,
    vocabulary: str | None = None,
    random_seed: int = 0,
    z_loss: float = 1e-4,
    log_period: int = 50,
    loss_eval_steps: int = 20,
    encoder_use_by: int | None = None,
    keep_checkpoints: int | None = None,
    base_dtype: str | None = "auto",
    export_dtype: str = "float32",
    config: str = "",
    allow_other_config: bool = False,
) -> dict[str, Any]:
    """Trains, and leaves in `model_dir` what `RunFolder` lists. A run that was interrupted goes on where it was saved.

    Args:
      model: with a `prompt_factory` where `prompt_init` is given.
      initial_checkpoint_path: the base; None for random weights.
      trainable: patterns of the paths to train: ["encoder/prompt/.*"] for prompt tuning, [".*"] for everything.
      optimizer: over the trainable parameters.
      train_steps: updates in all.
      eval_period: updates between two evaluations, each of which is also a checkpoint.
      prompt_init: see `prompts.initializers`.
      prompt_length: P.
      vocabulary: a SentencePiece model, or 'bytes'; None for the one beside the base.
      random_seed: of the prompt, the order of the data and dropout.
      z_loss: see `loss.cross_entropy`.
      log_period: updates between two records of the training loss.
      loss_eval_steps: batches that a task without metrics is evaluated on.
      encoder_use_by: a pre-training run whose `encoder_use` is below 0.02 nats at this step is stopped.
      keep_checkpoints: how many to leave; all where None.
      base_dtype: of the base in memory; see `checkpoints.base.load_base`. What is trained is float32 whatever it is.
      export_dtype: of the model written where more than the prompt is trained.
      config: the run's configuration, kept in config.gin.
      allow_other_config: go on with a run that had another configuration.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something given does not fit, known before the first step; or the loss is not finite.
    """
    clock = time.time()
    folder = RunFolder(model_dir, config, allow_other_config=allow_other_config)
    if min(train_steps, eval_period) < 1:
        raise ValueError(f"TRAIN_STEPS is {train_steps} and EVAL_PERIOD {eval_period}, expected at least 1")
    check_prompt_length(prompt_init, prompt_length, train_dataset)
    words = open_vocabulary(vocabulary, initial_checkpoint_path, model.config)
    path, params, base_fingerprint = (
        load_base(initial_checkpoint_path, model.config, base_dtype)
        if initial_checkpoint_path
        else random_base(model.config, random_seed)
    )
    if prompt_init is not None:
        params = params | {PROMPT: start_prompt(prompt_init, prompt_length, params, words, random_seed)}
    trained, frozen = split_trainable(params, trainable)
    frozen_fingerprint = fingerprint(frozen)
    batches = train_dataset.batches(words, seed=random_seed, shuffle=True)
    eval_batches = eval_dataset.eval_batches(words)
    check_labels(eval_batches, words)

    # A copy of its own: the step gives its state's memory up.
    trained = {name: jnp.array(value, jnp.float32, copy=True) for name, value in trained.items()}
    start = params.get(PROMPT)
    del params
    key = jax.random.key_data(jax.random.key(random_seed))
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), key)
    folder.open(keep_checkpoints, base_fingerprint if initial_checkpoint_path else None)
    step = folder.states.latest_step() or 0
    if step:
        state = folder.states.restore(step, state)
    records = folder.rewind(step)
    if start is not None and not step:
        write_prompt(folder.path / "prompts" / "0.npy", np.asarray(start))
    clock -= max((record["seconds"] for record in records), default=0.0)
    best = max((record for record in records if record["split"] == "eval"), key=score, default=None)

    train_step = make_train_step(model, optimizer, z_loss)
    evaluator = Evaluator(model, words)
    window = Window()
    stopped_early = any(ignores_encoder(record, encoder_use_by, eval_period) for record in records)
    with Terminated() as terminated, tqdm(total=train_steps, initial=step, disable=None, unit="step") as bar:
        for batch in batches.start_at(step, step if stopped_early else train_steps):
            state, metrics = train_step(state, frozen, batch)
            step += 1
            window.add(step, batch.ids, metrics)
            bar.update()
            last = step == train_steps
            evaluates = step % eval_period == 0 or last
            if step % log_period == 0 or evaluates:
                record = window.close() | prompt_metrics(state.trainable, start) | {"seconds": time.time() - clock}
                folder.log(step, "train", record)
                say(bar, step, "train", record)
            if evaluates:
                record, odd = evaluate(evaluator, state.trainable, frozen, eval_batches, loss_eval_steps)
                record["seconds"] = time.time() - clock
                folder.log(step, "eval", record)
                say(bar, step, "eval", record, f"; no label: {odd}" if odd else "")
                if PROMPT in state.trainable:
                    write_prompt(folder.path / "prompts" / f"{step}.npy", np.asarray(state.trainable[PROMPT]))
                if best is None or score(record) > score(best):
                    best = {"step": step, "split": "eval", **record}
                    export(folder.path / "best", state.trainable, frozen, model, words, export_dtype)
                folder.states.save(step, state)
                window.restart()
                stopped_early = ignores_encoder({"step": step, **record}, encoder_use_by, eval_period)
                if stopped_early:
                    break
            if terminated.by_signal and not last:
                window.check()
                folder.states.save(step, state)
                folder.close()
                print(f"terminated, saved at step {step}: the same command goes on from there", file=sys.stderr)
                sys.exit(TERMINATED)

    if stopped_early:
        print(f"stopped at step {step}: the decoder makes no use of the encoder", file=sys.stderr)
    if fingerprint(frozen) != frozen_fingerprint:
        raise RuntimeError("the frozen parameters changed in memory")
    if best is None:
        raise ValueError(f"{model_dir} has its last checkpoint but no evaluation: set another MODEL_DIR")
    summary = {
        "task": train_dataset.mixture_or_task_name,
        "train_split": train_dataset.split,
        "eval_split": eval_dataset.split,
        "base": path,
        "base_fingerprint": base_fingerprint,
        "seed": random_seed,
        "steps": step,
        "stopped_early": stopped_early,
        "best_step": best["step"],
        "best": {name: value for name, value in best.items() if name not in ("step", "split", "seconds")},
        "trainable_parameters": sum(int(value.size) for value in state.trainable.values()),
        "examples_seen": batches.examples_before(step),
        "seconds": time.time() - clock,
        "versions": versions(),
    }
    folder.close()
    write_text(folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def evaluate(
    evaluator: Evaluator, trainable: Params, frozen: Params, tasks: Mapping[str, Batches], loss_eval_steps: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Each task's metrics and the answers that are no label; the loss for a task without metrics.

    Of several tasks the metrics are called "task/metric", and the answers stand under their task.
    """
    record, odd = {}, {}
    for name, batches in tasks.items():
        if batches.examples.metrics:
            metrics, answers = evaluator.metrics(trainable, frozen, batches)
        else:
            metrics, answers = evaluator.losses(trainable, frozen, batches, loss_eval_steps), {}
        if len(tasks) == 1:
            return metrics, answers
        record |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        odd |= {name: answers} if answers else {}
    return record, odd


def ignores_encoder(record: Mapping[str, Any], by: int | None, eval_period: int) -> bool:
    """Whether this evaluation, the first from step `by` on, says that the decoder makes no use of the encoder."""
    return bool(by and by <= record["step"] < by + eval_period and record.get("encoder_use", 1.0) < 0.02)


def score(record: Mapping[str, Any]) -> float:
    """What the best step has most of: the mean over tasks of the mean of each one's metrics.

    Of tasks that have none, minus the mean of their losses.
    """
    tasks: dict[str, dict[str, float]] = {}
    for name, value in record.items():
        if name not in ("step", "split", "seconds"):
            task, _, metric = name.rpartition("/")
            tasks.setdefault(task, {})[metric] = value
    scores = {task: task_score(metrics) for task, metrics in tasks.items() if "loss" not in metrics}
    if (mean := suite_score(scores)) is not None:
        return mean
    return -float(np.mean([metrics["loss"] for metrics in tasks.values()]))


def export(
    folder: Path, trainable: Params, frozen: Params, model: Transformer, vocabulary: Vocabulary, dtype: str
) -> None:
    """Writes `prompt.npy`, and the whole model where more than the prompt was trained."""
    if PROMPT in trainable:
        write_prompt(folder / "prompt.npy", np.asarray(trainable[PROMPT]))
    if set(trainable) - {PROMPT}:
        huggingface.write(folder / "model", model.config, frozen | trainable, vocabulary.path, dtype)


def versions() -> dict[str, str]:
    """Of this project and what its numbers depend on."""
    packages = ("prompt_tuning_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""The training run, as a recipe: read everything, then step, evaluate, save, and at the end say what came out."""

import sys
from typing import Any

from tqdm import tqdm

from prompt_tuning_jax.checkpoints.base import Base, fingerprint, load_base, open_vocabulary, random_base
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.progress import Terminated
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.step import Params, make_train_step

TERMINATED = 143  # exit code after SIGTERM: saved, to be started again


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, and leaves in MODEL_DIR what `RunFolder` lists. A run that was interrupted goes on where it was saved.

    Returns:
      The summary, as in summary.json.

    Raises:
      ValueError: something given does not fit, known before the first step; or the loss is not finite.
    """
    folder = config.open_folder()
    base, words = open_base(config)
    run = Run(config, folder, base, words)
    del base  # where all of it is trained, the state's copy is the only one
    frozen_fingerprint = fingerprint(run.frozen)
    run.open()
    run.go_back(max(run.saved_steps, default=0))
    train_step = make_train_step(run.model, config.optimizer, config.z_loss, config.num_microbatches)
    evaluator = Evaluator(run.model, words)
    with Terminated() as terminated, tqdm(total=config.train_steps, initial=run.step, disable=None, unit="step") as bar:
        for batch in run.batches_to_come():
            state, metrics = train_step(run.state, run.frozen, batch)
            run.after_step(state, batch.ids, metrics, evaluator, lambda line: bar.write(line, file=sys.stderr))
            bar.update()
            if run.over:
                break
            if terminated.by_signal:
                run.save()
                print(f"terminated, saved at step {run.step}: the same command goes on from there", file=sys.stderr)
                sys.exit(TERMINATED)
    if run.stop_reason:
        print(f"stopped at step {run.step}: {run.stop_reason}", file=sys.stderr)
    check_unchanged(run.frozen, frozen_fingerprint)
    return run.finish()


def open_base(config: TrainConfig) -> tuple[Base, Vocabulary]:
    """The base that a run trains on, and its vocabulary."""
    words = open_vocabulary(config.vocabulary, config.initial_checkpoint_path, config.model.config)
    if config.initial_checkpoint_path:
        return load_base(config.initial_checkpoint_path, config.model.config, config.held_dtype), words
    return random_base(config.model.config, config.random_seed), words


def check_unchanged(frozen: Params, before: str) -> None:
    """Raises RuntimeError where the frozen parameters no longer have the fingerprint `before`."""
    if fingerprint(frozen) != before:
        raise RuntimeError("the frozen parameters changed in memory")

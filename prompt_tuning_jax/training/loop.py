"""The training run, as a recipe: read everything, then step, evaluate, save, and at the end say what came out."""

import sys
from typing import Any

from tqdm import tqdm

from prompt_tuning_jax.checkpoints.base import Base, fingerprint, load_base, open_vocabulary, random_base
from prompt_tuning_jax.parallel.mesh import MeshShape
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import PeerWatch, is_writer
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.layout import partitioner_for
from prompt_tuning_jax.training.progress import Terminated
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.step import Params, make_train_step

TERMINATED = 143  # exit code after SIGTERM: saved, to be started again


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, and leaves in MODEL_DIR what `RunFolder` lists. A run that was interrupted goes on where it was saved.

    Returns:
      The summary, as in summary.json.

    On more than one device the run lies on a mesh, see `layout`. Of several processes, all call this.

    Raises:
      ValueError: something given does not fit, known before the first step; or the loss is not finite.
    """
    with PeerWatch() as watch:
        return _train(config, watch)


def _train(config: TrainConfig, watch: PeerWatch) -> dict[str, Any]:
    folder = config.open_folder()
    partitioner = partitioner_for(config)
    if partitioner is not None:
        say(f"mesh: {MeshShape(*partitioner.mesh.devices.shape)}")
        partitioner.on_batch = watch.work
    base, words = open_base(config, partitioner)
    run = Run(config, folder, base, words, partitioner)
    del base  # where all of it is trained, the state's copy is the only one
    frozen_fingerprint = fingerprint(run.frozen)
    run.open()
    run.go_back(max(run.saved_steps, default=0))
    watch.saved_step = run.saved_step
    train_step = make_train_step(
        run.model, config.optimizer, config.z_loss, config.num_microbatches, partitioner, run.state_shardings
    )
    evaluator = Evaluator(run.model, words, partitioner)
    quiet = None if is_writer() else True
    with (
        Terminated() as terminated,
        tqdm(total=config.train_steps, initial=run.step, disable=quiet, unit="step") as bar,
    ):
        for batch in run.batches_to_come():
            state, metrics = train_step(run.state, run.frozen, run.placed(batch))
            run.after_step(state, batch.ids, metrics, evaluator, lambda line: say(line, bar))
            watch.saved_step = run.saved_step
            bar.update()
            if run.over:
                break
            if terminated.after(run.step):
                run.save()
                say(f"terminated, saved at step {run.step}: the same command goes on from there")
                sys.exit(TERMINATED)
    if run.stop_reason:
        say(f"stopped at step {run.step}: {run.stop_reason}")
    check_unchanged(run.frozen, frozen_fingerprint)
    return run.finish()


def say(line: str, bar: tqdm | None = None) -> None:
    """Says it on stderr, above the bar where there is one; of several processes one does."""
    if is_writer():
        (bar or tqdm).write(line, file=sys.stderr)


def open_base(config: TrainConfig, partitioner: Partitioner | None = None) -> tuple[Base, Vocabulary]:
    """The base that a run trains on, in its place on the mesh, and its vocabulary."""
    words = open_vocabulary(config.vocabulary, config.initial_checkpoint_path, config.model.config)
    size, place = config.model.config, None if partitioner is None else partitioner.parameter
    if config.initial_checkpoint_path:
        return load_base(config.initial_checkpoint_path, size, config.held_dtype, place), words
    return random_base(size, config.random_seed, place), words


def check_unchanged(frozen: Params, before: str) -> None:
    """Raises RuntimeError where the frozen parameters no longer have the fingerprint `before`."""
    if fingerprint(frozen) != before:
        raise RuntimeError("the frozen parameters changed in memory")

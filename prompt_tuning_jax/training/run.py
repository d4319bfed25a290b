"""One training run between its steps: what it starts from, where it stands, and what it leaves after each step.

`loop.train` takes the steps of one run, `sweeps.vectorized` those of many in one program; a run cannot tell which.
"""

import dataclasses
import functools
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from prompt_tuning_jax.batches.dataset import DatasetConfig
from prompt_tuning_jax.batches.loader import Batch, Batches
from prompt_tuning_jax.checkpoints import huggingface
from prompt_tuning_jax.checkpoints.base import Base, auto_dtype
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import barrier
from prompt_tuning_jax.prompts.files import write_prompt
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.t5.quantized import check_trainable, embedding_table
from prompt_tuning_jax.tasks.metrics import NOT_METRICS, record_score
from prompt_tuning_jax.tasks.vocabularies import Vocabulary
from prompt_tuning_jax.training.evaluation import Evaluator, check_labels
from prompt_tuning_jax.training.progress import Window, prompt_metrics
from prompt_tuning_jax.training.run_folder import RunFolder, write_text
from prompt_tuning_jax.training.start import check_prompt_length, start_prompt
from prompt_tuning_jax.training.step import PROMPT, PROMPT_PATHS, Params, StepMetrics, TrainState, split_trainable

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run.

    Attributes:
      model_dir: MODEL_DIR, where `RunFolder` says what is left.
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
      num_microbatches: that a batch is divided into, so that less has to be in memory at once; see `step.micro_batch`.
      log_period: updates between two records of the training loss.
      loss_eval_steps: batches that a task without metrics is evaluated on.
      encoder_use_by: a pre-training run whose `encoder_use` is below 0.02 nats at this step is stopped.
      early_stop_evals: a run is stopped after so many evaluations in a row without a better one; None for never.
      keep_checkpoints: how many to leave; all where None.
      base_dtype: of the base in memory; see `checkpoints.base.load_base`. "auto" keeps the file's own on accelerators
        where more than the prompt is trained. What is trained is float32 whatever it is.
      num_partitions: devices that share each parameter and the products with it (T5X's name).
      mesh: sizes of the axes data, fsdp and model; see `parallel.mesh`. None, and no `num_partitions`: by the size of
        the model and the memory of the devices, see `layout.mesh_for`.
      export_dtype: of the model written where more than the prompt is trained.
      config: the run's configuration as text, kept in config.gin.
      allow_other_config: go on with a run that had another configuration.
    """

    model_dir: str
    model: Transformer
    initial_checkpoint_path: str | None
    train_dataset: DatasetConfig
    eval_dataset: DatasetConfig
    trainable: Sequence[str]
    optimizer: optax.GradientTransformation
    train_steps: int
    eval_period: int
    prompt_init: Callable[..., jax.Array] | None = None
    prompt_length: int = 0
    vocabulary: str | None = None
    random_seed: int = 0
    z_loss: float = 1e-4
    num_microbatches: int | None = None
    log_period: int = 50
    loss_eval_steps: int = 20
    encoder_use_by: int | None = None
    early_stop_evals: int | None = None
    keep_checkpoints: int | None = None
    base_dtype: str | None = "auto"
    num_partitions: int | None = None
    mesh: Mapping[str, int] | None = None
    export_dtype: str = "float32"
    config: str = ""
    allow_other_config: bool = False

    def open_folder(self) -> RunFolder:
        """The run's folder; nothing is read or written yet.

        Raises:
          ValueError: a setting is impossible by itself, or the folder cannot be written or holds another run.
        """
        folder = RunFolder(self.model_dir, self.config, allow_other_config=self.allow_other_config)
        self.check()
        return folder

    def check(self) -> None:
        """Raises ValueError where a setting is impossible by itself."""
        if min(self.train_steps, self.eval_period) < 1:
            raise ValueError(
                f"TRAIN_STEPS is {self.train_steps} and EVAL_PERIOD {self.eval_period}, expected at least 1"
            )
        if self.early_stop_evals is not None and self.early_stop_evals < 1:
            raise ValueError(f"EARLY_STOP_EVALS is {self.early_stop_evals}, expected at least 1, or None")
        parts, batch_size = self.num_microbatches, self.train_dataset.batch_size
        if parts is not None and (parts < 1 or batch_size % parts):
            raise ValueError(f"NUM_MICROBATCHES is {parts}, expected a divisor of BATCH_SIZE, {batch_size}, or None")
        check_prompt_length(self.prompt_init, self.prompt_length, self.train_dataset)

    @property
    def held_dtype(self) -> Any:
        """`base_dtype`, "auto" resolved by what is trained."""
        if self.base_dtype != "auto":
            return self.base_dtype
        return auto_dtype(only_read=all(pattern.startswith(PROMPT_PATHS) for pattern in self.trainable))

    @property
    def prompted_model(self) -> Transformer:
        """The model, where it has a prompt with one of `prompt_length`."""
        if self.prompt_init is None:
            return self.model
        factory = functools.partial(self.model.prompt_factory, length=self.prompt_length)
        return self.model.clone(prompt_factory=factory)


class Run:
    """A run that has read everything, and goes on where it was saved.

    Attributes:
      model: with a prompt of this run's length.
      frozen: the parameters that are only read.
      state: after `step` updates.
      saved_step: that it would go on from if it ended here.
      stop_reason: why it ends before TRAIN_STEPS; None where it does not.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        base: Base,
        words: Vocabulary,
        partitioner: Partitioner | None = None,
    ):
        """Reads the data, and the state of a run already there.

        Args:
          folder: of `config.open_folder`.
          base: may be shared with other runs: it is only read.
          partitioner: of the mesh that the base lies on; None on one device.

        Raises:
          ValueError: something does not fit. Nothing has been written then.
        """
        self.config, self.words, self._folder, self._partitioner = config, words, folder, partitioner
        self._base = base._replace(params={})  # what is trained of it is held once, by the state
        self._clock = time.time()
        self.model, params = config.prompted_model, base.params
        if config.prompt_init is not None:
            table = embedding_table(params) if partitioner is None else partitioner.gather_table(params)
            prompt = start_prompt(config.prompt_init, config.prompt_length, table, words, config.random_seed)
            params = params | {PROMPT: prompt if partitioner is None else partitioner.replicate(prompt)}
        self._start = params.get(PROMPT)
        trained, self.frozen = split_trainable(params, config.trainable)
        check_trainable(trained, params)
        index, count = (0, 1) if partitioner is None else partitioner.own_rows(config.train_dataset.batch_size)
        self.batches = config.train_dataset.batches(
            words, seed=config.random_seed, shuffle=True, process_index=index, process_count=count
        )
        self._eval_batches = config.eval_dataset.eval_batches(words)
        check_labels(self._eval_batches, words)

        start = functools.partial(start_state, optimizer=config.optimizer, seed=config.random_seed)
        if partitioner is None:
            self.state = start(trained)
        else:
            self.state = partitioner.jit(start, out_shardings=partitioner.state(jax.eval_shape(start, trained)))(
                trained
            )
        self.step = self.saved_step = 0
        self.stop_reason: str | None = None
        self._best: dict[str, Any] | None = None
        self._evals: list[dict[str, Any]] = []
        self._window = Window()

    def open(self) -> None:
        """Makes the folder.

        Raises:
          ValueError: the run there is on another base.
        """
        has_base = self.config.initial_checkpoint_path is not None
        self._folder.open(self.config.keep_checkpoints, self._base.fingerprint if has_base else None)

    @property
    def saved_steps(self) -> list[int]:
        """Of the checkpoints in the folder, which is open."""
        return self._folder.states.steps()

    def go_back(self, step: int) -> None:
        """Takes the run up at a step that was saved, or at 0, and forgets what came after.

        Raises:
          ValueError: its state cannot be read.
        """
        config, folder = self.config, self._folder
        self.step = self.saved_step = step
        if step:
            self.state = folder.states.restore(step, self.state)
        records = folder.rewind(self.step)
        if self._start is not None and not self.step:
            folder.keep_prompt(0, self._start)
        self._clock = time.time() - max((record["seconds"] for record in records), default=0.0)
        self._evals = [record for record in records if record["split"] == "eval"]
        self._best = max(self._evals, key=record_score, default=None)
        self.stop_reason = stop_reason(self._evals, config)
        self._window.restart()

    @property
    def state_shardings(self) -> TrainState | None:
        """Where the state lies on the mesh; None on one device."""
        return None if self._partitioner is None else self._partitioner.state(self.state)

    def placed(self, batch: Batch) -> Batch:
        """The batch, of which this process has its rows, on the mesh where there is one."""
        if self._partitioner is None:
            return batch
        return self._partitioner.spread(batch, self.config.train_dataset.batch_size)

    @property
    def over(self) -> bool:
        return self.step >= self.config.train_steps or self.stop_reason is not None

    def batches_to_come(self) -> Iterator[Batch]:
        """The batches from where it stands to TRAIN_STEPS."""
        return self.batches.start_at(self.step, self.step if self.over else self.config.train_steps)

    def after_step(
        self, state: TrainState, ids: Int[np.ndarray, " B"], metrics: StepMetrics, evaluator: Evaluator, say: Say
    ) -> None:
        """Takes note of a step, and logs, evaluates and saves where it is time to.

        Args:
          ids: of the batch's examples.
          say: is told what was logged, in a line.

        Raises:
          ValueError: the loss is not finite.
        """
        config = self.config
        self.state, self.step = state, self.step + 1
        self._window.add(self.step, ids, metrics)
        evaluates = self.step % config.eval_period == 0 or self.step == config.train_steps
        if self.step % config.log_period == 0 or evaluates:
            self._log("train", self._window.close() | prompt_metrics(state.trainable, self._start), say)
        if evaluates:
            self._evaluate(evaluator, say)
            self._folder.states.save(self.step, state)
            self.saved_step = self.step
            self._window.restart()

    def _log(self, split: str, values: Mapping[str, float], say: Say, more: str = "") -> dict[str, Any]:
        record = {**values, "seconds": time.time() - self._clock}
        self._folder.log(self.step, split, record)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items())
        say(f"step {self.step} {split}: {numbers}{more}")
        return {"step": self.step, "split": split, **record}

    def _evaluate(self, evaluator: Evaluator, say: Say) -> None:
        config, trainable = self.config, self.state.trainable
        values, odd = evaluate(evaluator, trainable, self.frozen, self._eval_batches, config.loss_eval_steps)
        record = self._log("eval", values, say, f"; no label: {odd}" if odd else "")
        self._evals.append(record)
        if PROMPT in trainable:
            self._folder.keep_prompt(self.step, trainable[PROMPT])
        if self._best is None or record_score(record) > record_score(self._best):
            self._best = record
            self._export()
        self.stop_reason = stop_reason(self._evals, config)

    def _export(self) -> None:
        """Leaves what is trained in best/."""
        trainable, frozen = self.state.trainable, self.frozen
        if self._partitioner is not None and set(trainable) - {PROMPT}:
            trainable, frozen = self._partitioner.gather((trainable, frozen))
        if self._folder.writes:
            best = self._folder.path / "best"
            export(best, trainable, frozen, self.model, self.words, self.config.export_dtype)

    def save(self) -> None:
        """Saves the state between two evaluations, and closes the folder: the process is about to end."""
        self._window.check()
        self._folder.states.save(self.step, self.state)
        self._folder.close()

    def close(self) -> None:
        """Closes the folder as it is."""
        self._folder.close()

    def finish(self) -> dict[str, Any]:
        """Writes summary.json, and returns what is in it."""
        config, best = self.config, self._best
        if best is None:
            raise ValueError(f"{config.model_dir} has its last checkpoint but no evaluation: set another MODEL_DIR")
        summary = {
            "task": config.train_dataset.mixture_or_task_name,
            "train_split": config.train_dataset.split,
            "eval_split": config.eval_dataset.split,
            "base": self._base.path,
            "base_fingerprint": self._base.fingerprint,
            "seed": config.random_seed,
            "steps": self.step,
            "stopped_early": self.stop_reason is not None,
            "best_step": best["step"],
            "best": {name: value for name, value in best.items() if name not in NOT_METRICS},
            "trainable_parameters": sum(int(value.size) for value in self.state.trainable.values()),
            "examples_seen": self.batches.examples_before(self.step),
            "seconds": time.time() - self._clock,
            "versions": versions(),
        }
        self._folder.close()
        if self._folder.writes:
            write_text(self._folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        barrier("finished")
        return summary


def start_state(trained: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Before the first update. The parameters are copies: the step gives its state's memory up."""
    trained = {name: jnp.array(value, jnp.float32, copy=True) for name, value in trained.items()}
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), key)


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


def stop_reason(evals: Sequence[Mapping[str, Any]], config: TrainConfig) -> str | None:
    """Why a run of these evaluations is to end now; None where it is to go on."""
    by, period = config.encoder_use_by, config.eval_period
    for record in evals:
        if by and by <= record["step"] < by + period and record.get("encoder_use", 1.0) < 0.02:
            return "the decoder makes no use of the encoder"
    patience = config.early_stop_evals
    if patience is not None and len(evals) > patience:
        scores = [record_score(record) for record in evals]
        if max(scores[-patience:]) <= max(scores[:-patience]):
            return f"no better evaluation in {patience}"
    return None


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

"""Defines `TrainConfig`, the settings of a training run, and `Run`, which logs, evaluates and saves between its steps.

The module `loop` computes the steps, of one run or of several runs in one program. Both look the same to a run.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from prompt_tuning_jax.batches.dataset import DatasetConfig, shared_inputs
from prompt_tuning_jax.batches.loader import Batch, Batches, MixedBatches, PlannedBatches, StreamedBatches
from prompt_tuning_jax.checkpoints.base import auto_dtype, check_base_dtype, expected_shapes, with_size
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.checkpoints.state import all_agree
from prompt_tuning_jax.checkpoints.tuned import EXPORT_DTYPES, has_only_adapters, read_prompts, read_tuned, write_tuned
from prompt_tuning_jax.errors import Setting, SettingError, renamed
from prompt_tuning_jax.identity import describe
from prompt_tuning_jax.methods.fold import make_fold
from prompt_tuning_jax.methods.method import Injection, Method, Params, start_key
from prompt_tuning_jax.methods.shapes import check_injection, check_not_int8, start_shapes, trains_base
from prompt_tuning_jax.parallel.mesh import MeshSizes
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import barrier
from prompt_tuning_jax.prompts.files import read_prompt
from prompt_tuning_jax.settings import (
    Count,
    InstanceOf,
    Name,
    NotNegative,
    OneOf,
    Seed,
    Str,
    Switch,
    Text,
    check_values,
    keep_plain,
    shown,
)
from prompt_tuning_jax.t5.config import T5Config
from prompt_tuning_jax.tasks.metrics import NOT_METRICS, record_score
from prompt_tuning_jax.training.evaluation import Evaluator, check_labels, data_warnings
from prompt_tuning_jax.training.flop import StepShape, step_flop
from prompt_tuning_jax.training.progress import Window, prompt_norm_and_distance
from prompt_tuning_jax.training.run_folder import NoFolder, RunFolder, write_text
from prompt_tuning_jax.training.step import StepMetrics, TrainState
from prompt_tuning_jax.training.wall_time import WallTime

Say = Callable[[str], None]
Record = dict[str, Any]


def say_nothing(line: str) -> None:
    """Ignores a line of progress."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Holds all settings of a run.

    Attributes:
      size: the model's size and numerics, including the dropout rate.
      initial_checkpoint_path: the base model; None for random parameters.
      model: the base model, if it is in memory already. No checkpoint is then read.
      train_dataset, eval_dataset: the rows to train on, and the rows to evaluate on.
      method: what is trained; see `methods`.
      optimizer: updates the trainable parameters.
      train_steps: number of updates.
      eval_period: updates between two evaluations. Each evaluation also saves a checkpoint.
      model_dir: MODEL_DIR, the folder for the files that `run_folder` lists; None to write nothing.
      vocabulary: a SentencePiece model, a tokenizer.json or 'bytes'; None for the tokenizer beside the base model.
      random_seed: determines the initial parameters, the order of the data and the dropout masks.
      z_loss: see `loss.cross_entropy`.
      num_microbatches: number of parts that a batch is divided into to save memory; see `step.micro_batch_size`.
      log_period: updates between two records of the training loss.
      loss_eval_steps: number of batches on which a task without metrics is evaluated.
      encoder_use_by: for pre-training, stop the run if its first evaluation from this step on has an `encoder_use`
        below 0.02 nats per token; None for never.
      early_stop_evals: stop the run after this number of evaluations in a row without a better score; None for never.
      keep_checkpoints: number of checkpoints to keep, the latest; None for all.
      base_dtype: dtype of the base model in memory; see `checkpoints.base.load_base`. If parameters of the base model
        are trained, "auto" keeps the file's dtype on accelerators. Trained parameters are always float32.
      num_partitions: number of devices that share each parameter and the matmuls with it (T5X's name).
      mesh: sizes of the axes data, fsdp and model; see `parallel.mesh`. If both this and `num_partitions` are None, the
        model's size and the devices' memory determine the mesh; see `mesh_choice.mesh_for`.
      export_dtype: dtype of the exported model if parameters of the base model are trained.
      config: the run's gin configuration as text, which is written to config.gin, and compared with nothing.
      allow_other_config: whether to resume a run in MODEL_DIR that was started with other settings.
    """

    size: Annotated[T5Config | Any, InstanceOf(T5Config)]  # `check_values` reports any other type as a SettingError
    initial_checkpoint_path: Text | None
    model: Annotated[Model | Any, InstanceOf(Model)] | None = None
    train_dataset: Annotated[DatasetConfig | Any, InstanceOf(DatasetConfig)]
    eval_dataset: Annotated[DatasetConfig | Any, InstanceOf(DatasetConfig)]
    method: Method | Any
    optimizer: optax.GradientTransformation | Any
    train_steps: Count
    eval_period: Count
    model_dir: Name | None = None
    vocabulary: Text | None = None
    random_seed: Seed = 0
    z_loss: NotNegative = 1e-4
    num_microbatches: Count | None = None
    log_period: Count = 50
    loss_eval_steps: Count = 20
    encoder_use_by: Count | None = None
    early_stop_evals: Count | None = None
    keep_checkpoints: Count | None = None
    base_dtype: str | Any = "auto"
    num_partitions: Count | None = None
    mesh: MeshSizes | None = None
    export_dtype: Annotated[Str, OneOf(EXPORT_DTYPES)] = "float32"
    config: str = ""
    allow_other_config: Switch = False

    def __post_init__(self):
        keep_plain(self)
        check_values(TrainConfig, {"size": self.size})
        if not self.size.has_size:
            self.check_values()  # check before `with_size` reads a file
            object.__setattr__(self, "size", with_size(self.size, self.initial_checkpoint_path))

    def open_folder(self) -> RunFolder | NoFolder:
        """Returns the run's folder after checking the settings. Nothing is written to it yet.

        Raises:
          ValueError: a setting is invalid, or the folder is not writable or holds another run.
        """
        self.check()
        if self.model_dir is None:
            return NoFolder()
        return RunFolder(self.model_dir, self.identity(), self.config, allow_other_config=self.allow_other_config)

    def check(self) -> None:
        """Raises ValueError if a setting is invalid, or does not fit another setting. Reads no file."""
        self.check_values()
        parts, batch_size = self.num_microbatches, self.train_dataset.batch_size
        if parts is not None and batch_size % parts:
            raise SettingError(
                Setting("num_microbatches"),
                f" is {parts}, expected a divisor of ",
                Setting("batch_size"),
                f", {batch_size}, or None",
            )
        self.method.check(self.size, self.train_dataset.task_feature_lengths["inputs"])

    def check_values(self) -> None:
        """Raises SettingError if a field, or a field of a dataset, does not match its annotation."""
        check_run(vars(self))
        self.train_dataset.check()
        with renamed(batch_size="eval_batch_size", train_split="eval_split"):
            self.eval_dataset.check()

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide whether a run may resume, in a form that JSON can hold.

        The fingerprints of the model and the data are not included, because they are known only after reading. The
        folder, the mesh and the logging period are left out, because they change no result except by rounding.
        """
        lengths = self.train_dataset.task_feature_lengths
        return {
            "method": describe(self.method),
            "optimizer": describe(self.optimizer),
            "train_steps": self.train_steps,
            "eval_period": self.eval_period,
            "batch_size": self.train_dataset.batch_size,
            "random_seed": self.random_seed,
            "task_feature_lengths": describe(lengths),
            "model": describe(self.size),
            "base_dtype": describe(self.base_dtype),
            "z_loss": self.z_loss,
            "num_microbatches": self.num_microbatches,
            "loss_eval_steps": self.loss_eval_steps,
            "encoder_use_by": self.encoder_use_by,
            "early_stop_evals": self.early_stop_evals,
            "export_dtype": describe(self.export_dtype),
        }

    @functools.cached_property
    def trains_base(self) -> bool:
        """Returns whether parameters of the base model itself are trained."""
        base = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(self.size).items()}
        return trains_base(start_shapes(self.method, self.size, base)[0], base)

    @functools.cached_property
    def trains_parameters(self) -> bool:
        """Returns whether the method's injection has parameters, and not only prompts."""
        base = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in expected_shapes(self.size).items()}
        return bool(jax.eval_shape(self.method.apply, *start_shapes(self.method, self.size, base)).parameters)

    @property
    def resolved_base_dtype(self) -> Any:
        """The dtype of `base_dtype`, with "auto" resolved by the device and by what is trained."""
        return auto_dtype(only_read=not self.trains_base) if self.base_dtype == "auto" else self.base_dtype


def check_run(values: Mapping[str, Any]) -> None:
    """Raises SettingError if a value does not match the annotation of its field in `TrainConfig`.

    Args:
      values: values by field name. They must include the method and the optimizer.
    """
    check_values(TrainConfig, values)
    check_base_dtype(values.get("base_dtype"))
    method, optimizer = values["method"], values["optimizer"]
    if not isinstance(method, Method):
        hint = f"; did you mean {method.__name__}(...)?" if isinstance(method, type) else ""
        raise SettingError(
            Setting("method"), f" is {shown(method)}, expected a method such as PromptTuning(length=100){hint}"
        )
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise SettingError(Setting("optimizer"), f" is {shown(optimizer)}, expected an optimiser of optax")


class Run:
    """Holds a run's data, state and folder, and logs, evaluates and saves when a step requires it.

    Call `open`, then `restore_to` to the step to start from, then `after_step` for each step, and `finish`.

    Attributes:
      size: the model's configuration, with the numerics of this run.
      frozen: the parameters that are not trained.
      state: the training state after `step` updates.
      saved_step: the step from which the run would resume if it ended now.
      stop_reason: why the run ends before TRAIN_STEPS; None if it does not.
      summary: the content of summary.json. It is set when the run is finished.
    """

    summary: dict[str, Any]

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder | NoFolder,
        model: Model,
        partitioner: Partitioner | OneDevice = ONE_DEVICE,
        *,
        on_record: Callable[[Record], None] = lambda record: None,
        warn: Say | None = None,
        wall_time: WallTime | None = None,
    ):
        """Reads the data, and checks that the settings, the model and the data fit together. Writes nothing.

        Args:
          config: the run's settings.
          folder: what `config.open_folder` returned.
          model: the base model. It is not changed, so several runs may share it.
          partitioner: the partitioner of the mesh on which the model is placed.
          on_record: called with each record of metrics.jsonl when it is logged.
          warn: called with each line about the data that may be a mistake, such as truncated rows. None to write these
            lines to stderr, from process 0.
          wall_time: the split of the program that the run is in; None for a split that starts now.

        Raises:
          ValueError: the settings, the model or the data do not fit together.
        """
        self.config, self._folder, self._partitioner, self._on_record = config, folder, partitioner, on_record
        self.tokenizer, self.size, method = model.tokenizer, model.config, config.method
        # Keep no reference to the model. Its own copy of the trained parameters can then be freed.
        self._path, self._fingerprint = model.path, model.fingerprint
        self._clock = time.time()
        self.wall_time = wall_time or WallTime()
        trained = method.init(start_key(config.random_seed), model)
        check_not_int8(trained, model.parameters)
        self.frozen = {path: value for path, value in model.parameters.items() if path not in trained}
        injection = jax.eval_shape(method.apply, trained, self.frozen)
        check_injection(method, injection, config.size, model.parameters)
        trained = partitioner.place(trained)
        self._fold = make_fold(method, trained, self.frozen, partitioner.jit)

        warn = warn or data_warnings()
        index, count = partitioner.own_rows(config.train_dataset.batch_size)
        options: dict[str, Any] = {"process_index": index, "process_count": count, "say": warn}
        self.batches = config.train_dataset.batches(
            self.tokenizer, seed=config.random_seed, shuffle=True, then=config.eval_dataset, **options
        )
        self._eval_batches = config.eval_dataset.eval_batches(self.tokenizer, say=warn)
        check_labels(self._eval_batches, self.tokenizer)
        if warn is not None:
            for line in shared_inputs(self.batches, self._eval_batches):
                warn(line)
        self._prompt_of: Int[np.ndarray, " K"] | None = None
        if injection.task_prompts is not None:
            self._prompt_of = prompts_of_tasks(
                injection.task_prompts, self.batches, self._eval_batches, config.train_dataset.mixture_or_task_name
            )

        check_optimizer(config.optimizer, trained)
        start = functools.partial(start_state, optimizer=config.optimizer, seed=config.random_seed)
        shardings = partitioner.state_shardings(jax.eval_shape(start, trained))
        self.state = partitioner.jit(start, out_shardings=shardings)(trained) if shardings else start(trained)
        self._start = self._fold(self.state.trainable, self.frozen)._replace(parameters={})
        self._start = jax.tree.map(np.asarray, self._start)  # on the host, because the first step donates the state
        self.step = self.saved_step = 0
        self.stop_reason: str | None = None
        # The result of `restore_newest`. `open` sets it and `restore_to` takes it.
        self._newest: tuple[int, TrainState, list[str]] | None = None
        self._best: dict[str, Any] | None = None
        self._best_injection: Injection | None = None
        self._evals: list[dict[str, Any]] = []
        self._window = Window()
        self._trains_model = not trained.keys().isdisjoint(model.parameters)

    def open(self) -> list[str]:
        """Makes the folder, or opens it and reads the newest checkpoint if it has this run already.

        Returns:
          Lines to show: whether an earlier run is extended, and which prompt a new run starts from.

        Raises:
          ValueError: the run in the folder has another base model, tokenizer or data; another process uses the folder;
            or all checkpoints are damaged.
        """
        read = {
            # Random parameters need no fingerprint: the seed determines them.
            "base_fingerprint": self._fingerprint if self.config.initial_checkpoint_path or self.config.model else None,
            "tokenizer": self.tokenizer.fingerprint,
            "train_data": self.batches.fingerprint(),
            "eval_data": {name: batches.fingerprint() for name, batches in self._eval_batches.items()},
        }
        lines = self._folder.open(self.config.keep_checkpoints, read)
        self._newest = self._folder.states.restore_newest(self.state)
        start = None if self.saved_steps else self.config.method.start_line()
        return lines if start is None else [*lines, start]

    @property
    def prompt_length(self) -> int:
        """The number of prompt positions in front of the encoder's input, P; 0 if the method gives no prompt."""
        return self._start.length

    @property
    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, which must be open."""
        return self._folder.states.steps()

    def restore_to(self, step: int) -> list[str]:
        """Restores the run as it was at a saved step, or at step 0, and deletes the later records.

        Args:
          step: the step of a checkpoint, or 0 to start the run.

        Returns:
          Lines about damaged files in the folder, and what was done about each.

        Raises:
          ValueError: the checkpoint cannot be read, or another file is damaged and cannot be restored.
        """
        config, folder, newest = self.config, self._folder, self._newest
        self._newest = None
        self.step = self.saved_step = step
        if step:
            self.state = newest[1] if newest and newest[0] == step else folder.states.restore(step, self.state)
        records, lines = folder.rewind(self.step)
        lines = [*(newest[2] if newest else []), *lines]
        if not self.step:
            folder.keep_prompt(0, self._start)
        self._clock = time.time() - max((record["seconds"] for record in records), default=0.0)
        self._evals = [record for record in records if record["split"] == "eval"]
        self._best = max(self._evals, key=record_score, default=None)
        self.stop_reason = stop_reason(self._evals, config)
        if self._best is not None and isinstance(folder, RunFolder) and not folder.best_matches(step):
            lines += self._rewrite_best(folder, int(self._best["step"]))
        self._window.restart()
        return lines

    def _rewrite_best(self, folder: RunFolder, step: int) -> list[str]:
        """Writes best/ again, from the prompt that was kept at the best step or from that step's checkpoint.

        If the folder has neither, best/ stays as it is. It may be from a later step, which a killed run had reached
        after its last checkpoint; the resumed run then writes the same best/ at that step.

        Args:
          step: the step of the best evaluation.

        Returns:
          A line about what was done.

        Raises:
          ValueError: the folder has neither, nor a best/.
        """
        if all_agree(not folder.writes or self._best_from_prompt(folder, step)):
            return [f"{folder.path / 'best'} is written again from the prompt of step {step}"]
        if step == self.step or step in self.saved_steps:
            state = self.state if step == self.step else folder.states.restore(step, self.state)
            self._export(self._fold(state.trainable, self.frozen))
            return [f"{folder.path / 'best'} is written again from checkpoint {step}"]
        if not all_agree(not folder.writes or (folder.path / "best").is_dir()):
            raise SettingError(
                f"{folder.path / 'best'}, of step {step}, is gone, and so is that step's checkpoint: set another ",
                Setting("model_dir"),
            )
        return [f"{folder.path / 'best'} is not as it was at step {self.step}: a better evaluation will replace it"]

    def _best_from_prompt(self, folder: RunFolder, step: int) -> bool:
        """Writes best/ from the prompt that was kept at `step`.

        Returns whether this was possible, and gave the best/ whose hash the checkpoint has.
        """
        path = folder.kept_prompt(step)
        if path is None or self.config.trains_parameters:
            return False
        try:
            if self._start.task_prompts is not None:
                injection = Injection(
                    task_prompts={task: read_prompt(path / f"{task}.npy") for task in self._start.task_prompts}
                )
            else:
                injection = read_prompts(path)
        except ValueError:
            return False
        if jax.tree.map(np.shape, injection) != jax.tree.map(np.shape, self._start):
            return False
        write_tuned(folder.path / "best", injection, {}, config=self.size, vocabulary=None)
        return folder.states.extra(self.step).get("best") in (None, folder.best_hash())

    def _save(self) -> None:
        self._folder.states.save(self.step, self.state, {"evals": self._evals, **self._folder.logged()})

    @property
    def state_shardings(self) -> TrainState | None:
        """The shardings of the state on the mesh; None on one device."""
        return self._partitioner.state_shardings(self.state)

    def shard_batch(self, batch: Batch) -> Batch:
        """Places a batch on the mesh, and returns it.

        Args:
          batch: this process's own rows of the batch.
        """
        return self._partitioner.shard_rows(batch, self.config.train_dataset.batch_size)

    @property
    def is_over(self) -> bool:
        return self.step >= self.config.train_steps or self.stop_reason is not None

    def remaining_batches(self) -> Iterator[Batch]:
        """Returns the batches from this step to TRAIN_STEPS, with each row's task if there is a prompt per task."""
        batches = self.batches.start_at(self.step, self.step if self.is_over else self.config.train_steps)
        return batches if self._prompt_of is None else map(self._with_tasks, batches)

    def _with_tasks(self, batch: Batch) -> Batch:
        assert isinstance(self.batches, MixedBatches) and self._prompt_of is not None
        return batch._replace(tasks=self._prompt_of[self.batches.tasks_of(batch.ids)])

    def after_step(self, state: TrainState, batch: Batch, metrics: StepMetrics, evaluator: Evaluator, say: Say) -> None:
        """Records a step; logs, evaluates and saves if the periods require it.

        Args:
          state: the state after the step.
          batch: the step's batch: its examples' ids are for error messages, its widths for the FLOP.
          metrics: what the step reported.
          say: called with a line about each record that is logged.

        Raises:
          ValueError: the loss, a gradient, a trained parameter or a metric is not finite.
        """
        config = self.config
        self.state, self.step = state, self.step + 1
        self._check_step()
        shape = StepShape(
            config.train_dataset.batch_size, batch.inputs.shape[1], batch.targets.shape[1], self.prompt_length
        )
        self._window.add(self.step, batch.ids, metrics, step_flop(self.size, shape, trains_model=self._trains_model))
        evaluates = self.step % config.eval_period == 0 or self.step == config.train_steps
        logs = self.step % config.log_period == 0 or evaluates
        if not logs:
            return
        self._check_step()
        self._check_trained()
        injection = self._fold(state.trainable, self.frozen)
        self._log("train", self._window.close() | prompt_norm_and_distance(injection, self._start), say)
        if evaluates:
            with self.wall_time.part("evaluating"):
                self._evaluate(injection, evaluator, say)
            with self.wall_time.part("saving"):
                self._save()
            self.saved_step = self.step
            self._window.restart()

    def _check_step(self) -> None:
        """Raises SettingError if the newest step's loss or gradient norm is not finite.

        If the base model has NaN or infinity itself, the error names the array.
        """
        try:
            self._window.check()
        except SettingError:
            for path in not_finite(self.frozen):
                raise SettingError(
                    f"{path} of the base model holds NaN or infinity: set ", Setting("initial_checkpoint_path"),
                    " to a sound one",
                ) from None  # fmt: skip
            raise

    def _check_trained(self) -> None:
        """Raises SettingError if a trained parameter is not finite."""
        for path in not_finite(self.state.trainable):
            raise SettingError(
                f"{path} holds NaN or infinity after step {self.step}: lower ", Setting("learning_rate"),
                "; earlier checkpoints are unchanged",
            )  # fmt: skip

    def _log(self, split: str, values: Mapping[str, float], say: Say, more: str = "") -> Record:
        for name, value in values.items():
            if not math.isfinite(value):
                raise SettingError(
                    f"{name} of {split} is {value} at step {self.step}, expected a finite number: lower ",
                    Setting("learning_rate"),
                    f", or, if {name} is your own metric, correct it; earlier checkpoints are unchanged",
                )
        record = {"step": self.step, "split": split, **values, "seconds": time.time() - self._clock}
        self._folder.log(record)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name not in ("step", "split"))
        say(f"step {self.step} {split}: {numbers}{more}")
        self._on_record(record)
        return record

    def _evaluate(self, injection: Injection, evaluator: Evaluator, say: Say) -> None:
        config = self.config
        values, invalid = evaluate(evaluator, injection, self.frozen, self._eval_batches, config.loss_eval_steps)
        record = self._log("eval", values, say, f"; no label: {invalid}" if invalid else "")
        self._evals.append(record)
        with self.wall_time.part("saving"):
            self._folder.keep_prompt(self.step, injection)
            if self._best is None or record_score(record) > record_score(self._best):
                self._best = record
                self._export(injection)
        self.stop_reason = stop_reason(self._evals, config)

    def _export(self, injection: Injection) -> None:
        """Keeps the injection of the best evaluation: in best/, or in memory if there is no folder."""
        if isinstance(self._folder, NoFolder):
            self._best_injection = self._partitioner.gather(injection)
            return
        frozen = self.frozen
        if injection.parameters:
            injection = self._partitioner.gather(injection)
            if not has_only_adapters(injection.parameters):
                frozen = self._partitioner.gather(frozen)
        if self._folder.writes:
            tuned = {"config": self.size, "vocabulary": self.tokenizer.path, "dtype": self.config.export_dtype}
            write_tuned(self._folder.path / "best", injection, frozen, base=self._path, **tuned)

    @property
    def best_injection(self) -> Injection:
        """What the model ran with at the best evaluation, in host memory."""
        if self._best_injection is not None:
            return self._best_injection
        assert isinstance(self._folder, RunFolder)
        return read_tuned(self._folder.path / "best", self.size)

    def save(self) -> None:
        """Saves the state, also between two evaluations, and closes the folder, because the process is about to end.

        Raises:
          ValueError: the newest loss or a trained parameter is not finite, so that the state is not worth saving.
        """
        self._check_step()
        self._check_trained()
        self._save()
        self._folder.close()

    def close(self) -> None:
        """Closes the folder without saving."""
        self._folder.close()

    def abandon(self) -> None:
        """Closes the folder after an error, and hides errors of closing. Does nothing if the folder is closed."""
        self._folder.abandon()

    def finish(self) -> dict[str, Any]:
        """Writes summary.json, closes the folder, and returns the summary.

        Raises:
          SettingError: the run has no evaluation, so it has no best step.
        """
        config, best = self.config, self._best
        if best is None:
            raise SettingError(
                f"{config.model_dir} has its last checkpoint but no evaluation: set another ", Setting("model_dir")
            )
        with self.wall_time.part("saving"):
            self._folder.wait()
        summary = {
            "task": config.train_dataset.mixture_or_task_name,
            "train_split": config.train_dataset.split,
            "eval_split": config.eval_dataset.split,
            "method": type(config.method).__name__,
            "base": self._path,
            "base_fingerprint": self._fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "seed": config.random_seed,
            "steps": self.step,
            "stopped_early": self.stop_reason is not None,
            "best_step": best["step"],
            "best": {name: value for name, value in best.items() if name not in NOT_METRICS},
            "trainable_parameters": sum(int(value.size) for value in self.state.trainable.values()),
            "examples_seen": self.batches.examples_before(self.step),
            "seconds": time.time() - self._clock,
            "wall_time": self.wall_time.split(),  # of this process: not of those before a resume
            "versions": versions(),
        }
        self.summary = summary
        if self._folder.writes:
            write_text(self._folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        barrier("finished")
        self._folder.close()
        return summary


def prompts_of_tasks(
    prompts: Collection[str], train: PlannedBatches, evaluated: Collection[str], mixture: str
) -> Int[np.ndarray, " K"]:
    """Returns the index of each training task's prompt among the sorted task names, for `Injection.of_rows`.

    Args:
      prompts: names of the tasks that have a prompt.
      train: the training batches.
      evaluated: names of the tasks of the validation data.
      mixture: the name of the training data.

    Raises:
      SettingError: the tasks that have a prompt are not the tasks of the data.
    """
    tasks, own = Setting("tasks"), sorted(prompts)
    if isinstance(train, StreamedBatches):
        raise SettingError(
            Setting("use_cached_tasks"), " is False, but streamed rows have no task names, and each task has a prompt "
            "of its own: set it to True",
        )  # fmt: skip
    if not isinstance(train, MixedBatches):
        raise SettingError(
            tasks, f" has {', '.join(own)}, with a prompt each, but {mixture} is one task: set ",
            Setting("mixture_or_task_name"), " to the mixture of these tasks",
        )  # fmt: skip
    found = [*train.parts]
    if sorted(found) != own:
        raise SettingError(
            tasks, f" has {', '.join(own)}, but the training data has the tasks {', '.join(found)}: set ", tasks,
            " to these",
        )  # fmt: skip
    for task in evaluated:
        if task not in own:
            raise SettingError(
                Setting("eval_split"), f" has the task {task}, which has no prompt: ", tasks, f" has {', '.join(own)}"
            )
    return np.array([own.index(task) for task in found], np.int32)


def not_finite(values: Params) -> Iterator[str]:
    """Yields the paths of the arrays that have NaN or infinity."""
    yield from (path for path, finite in jax.device_get(_finite(dict(values))).items() if not finite)


@jax.jit
def _finite(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # Use one program for all arrays. A program per array would run a collective for each sharded array, and CPU
    # processes with many such small programs in flight can deadlock.
    return {path: jnp.isfinite(value).all() for path, value in values.items()}


def check_optimizer(optimizer: optax.GradientTransformation, trained: Params) -> None:
    """Raises SettingError if an optimiser cannot update these parameters. Only shapes are computed."""
    shapes = {name: jax.ShapeDtypeStruct(value.shape, jnp.float32) for name, value in trained.items()}
    try:
        jax.eval_shape(lambda params: optimizer.update(params, optimizer.init(params), params), shapes)
    except SettingError:
        raise
    except Exception as error:  # an optimiser of the user may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
        raise SettingError(Setting("optimizer"), f" cannot update what the method trains ({why})") from error


def start_state(trained: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first update, with copies of the parameters, because the step donates the state."""
    trained = {name: jnp.array(value, jnp.float32, copy=True) for name, value in trained.items()}
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), key)


def evaluate(
    evaluator: Evaluator, injection: Injection, frozen: Params, tasks: Mapping[str, Batches], loss_eval_steps: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluates an injection on each task: by its metrics, or by the loss if the task has no metrics.

    Returns:
      The metrics by name, and the counts of the most frequent invalid answers by text. With several tasks, the metrics'
      names are "task/metric", and the counts are in a dictionary by task.
    """
    record, invalid = {}, {}
    for name, batches in tasks.items():
        own = injection.of_task(name)
        if batches.examples.metrics:
            metrics, answers = evaluator.metrics(own, frozen, batches)
        else:
            metrics, answers = evaluator.losses(own, frozen, batches, loss_eval_steps), {}
        if len(tasks) == 1:
            return metrics, answers
        record |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        invalid |= {name: answers} if answers else {}
    return record, invalid


def stop_reason(evals: Sequence[Mapping[str, Any]], config: TrainConfig) -> str | None:
    """Returns why a run with these evaluations must end now; None if it continues."""
    by, period = config.encoder_use_by, config.eval_period
    for record in evals:
        if by and by <= record["step"] < by + period and record.get("encoder_use", 1.0) < 0.02:
            return "the decoder makes no use of the encoder"
    # Ignore the evaluation at the last step before a run was extended: a run with all its steps from the start has none
    # there, and both must stop at the same step.
    evals = [record for record in evals if record["step"] % period == 0 or record["step"] == config.train_steps]
    patience = config.early_stop_evals
    if patience is not None and len(evals) > patience:
        scores = [record_score(record) for record in evals]
        if max(scores[-patience:]) <= max(scores[:-patience]):
            return f"no better evaluation in {patience}"
    return None


def versions() -> dict[str, str]:
    """Returns the versions of Python, this package, and the packages that its results depend on."""
    packages = ("prompt_tuning_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""Trains: reads everything first, then updates, evaluates and saves, and returns the finished run.

One run has a compiled program of its own. Several runs of a sweep may share a program. Both use the loop of
`take_steps`.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import fingerprint, load_base, open_vocabulary, random_base, resolve, with_ids
from prompt_tuning_jax.checkpoints.model import Model
from prompt_tuning_jax.parallel.mesh import MeshShape
from prompt_tuning_jax.parallel.one_device import ONE_DEVICE, OneDevice
from prompt_tuning_jax.parallel.partitioner import Partitioner
from prompt_tuning_jax.parallel.processes import PeerWatch, is_writer
from prompt_tuning_jax.t5.network import Transformer
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.mesh_choice import partitioner_for
from prompt_tuning_jax.training.profile import AfterStep, profiling
from prompt_tuning_jax.training.progress import Stop, Stopped
from prompt_tuning_jax.training.run import Record, Run, Say, TrainConfig, say_nothing
from prompt_tuning_jax.training.run_folder import full_disk
from prompt_tuning_jax.training.step import Params, StepMetrics, TrainState, make_train_step
from prompt_tuning_jax.training.wall_time import WallTime

States = tuple[TrainState, ...]
Batches = Sequence[Batch]
# (states, frozen, batches) -> (states, metrics), with one state, batch and metrics per run of the program
Step = Callable[[States, Params, Batches], tuple[States, Sequence[StepMetrics]]]


def say_on_stderr(line: str, bar: tqdm | None = None) -> None:
    """Writes a line to stderr, above the progress bar if there is one. Only process 0 writes."""
    if is_writer():
        (bar or tqdm).write(line, file=sys.stderr)


class Member:
    """Holds one run's slot in a program, which several runs may share.

    Attributes:
      active: False once the run is over or has failed. Until the program is compiled anew, its slot still computes, and
        the results are ignored.
      failure: the error that ended the run; None if there was none.
      summary: what `Run.finish` returned; empty before.
    """

    def __init__(self, run: Run, name: str = "", on_end: Callable[["Member"], None] = lambda member: None):
        """Does not start the run.

        Args:
          name: written in front of each line about the run; "" for no name.
          on_end: called once the run is over or has failed.
        """
        self.run, self.name, self._on_end = run, name, on_end
        self.active = True
        self.failure: Exception | None = None
        self.summary: dict[str, Any] = {}

    def start(self) -> None:
        self.state, self._stream = self.run.state, self.run.remaining_batches()
        self._frozen_fingerprint = fingerprint(self.run.frozen)
        if self.run.is_over:
            self.end()

    def next_batch(self) -> Batch:
        if self.active:
            self.batch = next(self._stream)
        return self.batch

    def after_step(self, metrics: StepMetrics, evaluator: Evaluator, say: Say) -> None:
        self.run.after_step(self.state, self.batch, metrics, evaluator, self.named(say))
        if self.run.is_over:
            self.end()

    def named(self, say: Say) -> Say:
        """Returns `say` with the run's name in front of each line."""
        return (lambda line: say(f"{self.name}: {line}")) if self.name else say

    def end(self) -> None:
        self.active = False
        with self.run.wall_time.part("other"):
            self._finish()
        self._on_end(self)

    def _finish(self) -> None:
        # Check before the summary is written, because a run with a summary counts as finished.
        check_unchanged(self.run.frozen, self._frozen_fingerprint)
        self.summary = self.run.finish()

    @contextlib.contextmanager
    def isolating_failure(self) -> Iterator[None]:
        """Lets an error within this context end this run, and none of the other runs."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.active, self.failure = False, full_disk(error, self.run.config.model_dir)
            self.run.abandon()
            self._on_end(self)


def train(
    config: TrainConfig,
    *,
    say: Say | None = say_on_stderr,
    on_record: Callable[[Record], None] = lambda record: None,
    warn: Say | None = None,
    progress: bool = True,
    stop: Stop = lambda step: False,
    watch: PeerWatch | None = None,
    profile: int = 0,
) -> Run:
    """Trains one run, or resumes it if MODEL_DIR has it already. `run_folder` lists the files that it writes there.

    With several devices, the run is sharded over a mesh, see `mesh_choice`. With several processes, every process must
    call this function.

    Args:
      config: the run's settings.
      say: called with each line that reports what happens; None to show only the progress bar.
      on_record: called with each record of metrics.jsonl when it is logged.
      warn: called with each line about the data that may be a mistake; and, if `say` is None, with each line about a
        damaged file in the folder. None to write these lines to stderr.
      progress: whether to show a progress bar.
      stop: called with the step after each step; if it returns True, the run is saved and `Stopped` is raised.
      watch: the watch over the other processes, which is notified of each batch and of each saved step.
      profile: the number of steps to trace, as in `profile.profiling`; 0 for no trace.

    Returns:
      The finished run.

    Raises:
      ValueError: a setting, a file or the data is invalid, which is found before the first step; or the loss is not
        finite.
      Stopped: `stop` returned True, and the run is saved.
    """
    wall_time = WallTime()
    folder = config.open_folder()
    partitioner = partitioner_for(config)
    if not isinstance(partitioner, OneDevice):
        (say or say_nothing)(f"mesh: {MeshShape(*partitioner.mesh.devices.shape)}")
        if watch is not None:
            partitioner.on_batch = watch.note_work
    run = Run(
        config,
        folder,
        open_model(config, partitioner),  # the run alone refers to it, and frees what it has copied
        partitioner,
        on_record=on_record,
        warn=warn,
        wall_time=wall_time,
    )
    try:
        with profiling(config.model_dir, profile, say or say_nothing) as after_step:
            return _train(run, partitioner, say, warn or say_on_stderr, progress, stop, watch, after_step)
    finally:
        run.abandon()


def _train(
    run: Run,
    partitioner: Partitioner | OneDevice,
    say: Say | None,
    warn: Say,
    progress: bool,
    stop: Stop,
    watch: PeerWatch | None,
    after_step: AfterStep,
) -> Run:
    """Trains a run that has read its model and data. The caller closes the run's folder, also after an error."""
    for line in run.open():
        (say or say_nothing)(line)
    for line in run.restore_to(max(run.saved_steps, default=0)):
        (say or warn)(line)
    member = Member(run)
    member.start()
    evaluator = Evaluator(run.size, run.tokenizer, partitioner)
    take_steps(
        [member],
        functools.partial(_single_run_program, partitioner=partitioner),
        lambda _: evaluator,
        say=say,
        progress=progress,
        stop=stop,
        saved=lambda: None if watch is None else setattr(watch, "saved_step", run.saved_step),
        after_step=after_step,
    )
    if member.failure is not None:
        raise member.failure
    if run.stop_reason:
        (say or say_nothing)(f"stopped at step {run.step}: {run.stop_reason}")
    return run


def _single_run_program(runs: Sequence[Run], partitioner: Partitioner | OneDevice) -> Step:
    """Returns the compiled step of a program with a single run."""
    (run,) = runs
    config = run.config
    step = make_train_step(
        Transformer(run.size),
        config.method,
        config.optimizer,
        config.z_loss,
        config.num_microbatches,
        partitioner,
        run.state_shardings,
    )

    def alone(states: States, frozen: Params, batches: Batches) -> tuple[States, Sequence[StepMetrics]]:
        state, metrics = step(states[0], frozen, run.shard_batch(batches[0]))
        return (state,), (metrics,)

    return alone


def take_steps(
    members: Sequence[Member],
    program_of: Callable[[Sequence[Run]], Step],
    evaluator_of: Callable[[Run], Evaluator],
    *,
    say: Say | None,
    progress: bool,
    stop: Stop,
    saved: Callable[[], None] = lambda: None,
    after_step: AfterStep = lambda values: None,
) -> None:
    """Trains runs that share a program until each run is over or has failed.

    When enough runs have ended, the program is compiled anew for those that are left; see `program_size`.

    Args:
      members: the started runs. Each continues from its own step.
      program_of: returns the compiled step for some of the runs.
      evaluator_of: returns the evaluator of a run.
      say, progress, stop: as in `train`.
      saved: called after each step; the runs may have been saved just before.
      after_step: called with what each step returns, before anything is logged or evaluated.

    Raises:
      Stopped: `stop` returned True, and all runs are saved.
    """
    slots, step = [member for member in members if member.active], None
    steps = max((member.run.config.train_steps for member in slots), default=0)
    first = max((member.run.step for member in slots), default=0)
    hidden = None if progress and is_writer() else True  # with None, tqdm shows the bar if stderr is a terminal
    with tqdm(total=steps, initial=first, disable=hidden, unit="step") as bar:
        show = say_nothing if say is None else functools.partial(_show, say, bar)
        while active := [member for member in slots if member.active]:
            if step is None or program_size(len(active)) < len(slots):
                slots = active
                step = program_of([member.run for member in slots])
            wall_time = slots[0].run.wall_time  # all runs of a program have the same
            with wall_time.part("waiting_for_data"):
                batches = [member.next_batch() for member in slots]
            with wall_time.part("stepping"):
                states, metrics = step(tuple(member.state for member in slots), slots[0].run.frozen, batches)
                after_step((states, metrics))
                for member, state, own in zip(slots, states, metrics, strict=True):
                    member.state = state
                    if member.active:
                        with member.isolating_failure():
                            member.after_step(own, evaluator_of(member.run), show)
            saved()
            taken = max(member.run.step for member in active)
            bar.update(taken - bar.n)
            left = [member for member in slots if member.active]
            if left and stop(taken):
                for member in left:
                    with member.isolating_failure():
                        member.run.save()
                raise Stopped(f"terminated, saved at step {taken}: the same command goes on from there")


def _show(say: Say, bar: tqdm, line: str) -> None:
    if say is say_on_stderr:
        say_on_stderr(line, bar)
    else:
        say(line)


def program_size(active: int) -> int:
    """Returns the largest number of slots with which a program for `active` runs is kept: 1, 2, 3, 4, 6, 8, 12, ...

    A smaller program must first be compiled, which costs more time than a few unused slots.
    """
    sizes = sorted({2**n for n in range(12)} | {3 * 2**n for n in range(12)})
    return next(size for size in sizes if size >= active)


def open_model(config: TrainConfig, partitioner: Partitioner | OneDevice = ONE_DEVICE) -> Model:
    """Returns the run's base model, placed on the mesh, and its tokenizer.

    The model is `config.model` if that is set. Otherwise it is read from `config.initial_checkpoint_path`, or has
    random parameters if there is no path.
    """
    size, model = config.size, config.model
    if model is not None:
        parameters = partitioner.place(model.parameters)
        return Model(model.path, size, parameters, model.tokenizer, model.fingerprint, partitioner.gather_table)
    location = config.initial_checkpoint_path and resolve(config.initial_checkpoint_path)
    tokenizer = open_vocabulary(config.vocabulary, location, size)
    size = with_ids(size, tokenizer)
    if location:
        base = load_base(location, size, config.resolved_base_dtype, partitioner.parameter_sharding)
    else:
        base = random_base(size, config.random_seed, partitioner.parameter_sharding)
    return Model(base.path, size, base.params, tokenizer, base.fingerprint, partitioner.gather_table)


def check_unchanged(frozen: Params, before: str) -> None:
    """Raises RuntimeError if the frozen parameters no longer have the fingerprint `before`."""
    if fingerprint(frozen) != before:
        raise RuntimeError("the frozen parameters changed in memory")

"""The training loop, as a recipe: read everything, then step, evaluate, save, and at the end say what came out.

One run takes a program of its own, and several runs may share one: `take_steps` is the loop of both.
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
from prompt_tuning_jax.training.progress import Stop, Stopped
from prompt_tuning_jax.training.run import Record, Run, Say, TrainConfig, say_nothing
from prompt_tuning_jax.training.step import Params, StepMetrics, TrainState, make_train_step
from prompt_tuning_jax.training.wall_time import WallTime

States = tuple[TrainState, ...]
Batches = Sequence[Batch]
# (states, frozen, batches) -> (states, metrics), of all runs of a program
Step = Callable[[States, Params, Batches], tuple[States, Sequence[StepMetrics]]]


def say_on_stderr(line: str, bar: tqdm | None = None) -> None:
    """Shows a line on stderr, above the bar if there is one; with several processes one of them does."""
    if is_writer():
        (bar or tqdm).write(line, file=sys.stderr)


class Member:
    """A run's place in a program.

    Attributes:
      active: false once its run is over or has failed; its slot in the program then computes on, for nothing.
      failure: why it failed.
    """

    def __init__(self, run: Run, name: str = "", on_end: Callable[["Member"], None] = lambda member: None):
        """`on_end` is called once the run is over or has failed."""
        self.run, self.name, self._on_end = run, name, on_end
        self.active = True
        self.failure: Exception | None = None
        self.summary: dict[str, Any] = {}

    def start(self) -> None:
        self.state, self._stream = self.run.state, self.run.batches_to_come()
        self._frozen_fingerprint = fingerprint(self.run.frozen)
        if self.run.over:
            self.end()

    def next_batch(self) -> Batch:
        if self.active:
            self.batch = next(self._stream)
        return self.batch

    def after_step(self, metrics: StepMetrics, evaluator: Evaluator, say: Say) -> None:
        self.run.after_step(self.state, self.batch.ids, metrics, evaluator, self.named(say))
        if self.run.over:
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
        # Before the summary is written: a run that has one counts as finished.
        check_unchanged(self.run.frozen, self._frozen_fingerprint)
        self.summary = self.run.finish()

    @contextlib.contextmanager
    def failing_alone(self) -> Iterator[None]:
        """What goes wrong with this run ends it, and no other."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.active, self.failure = False, error
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
) -> Run:
    """Trains one run, and leaves in MODEL_DIR what `RunFolder` lists. A run that was interrupted is resumed.

    With more than one device the run is sharded over a mesh, see `mesh_choice`. With several processes, every process
    calls this.

    Args:
      say: shows a line of what happens; None for nothing but the progress bar.
      on_record: is given every record of metrics.jsonl as it is made.
      warn: is told what of the data does not fit, and what of the folder was damaged if `say` is None; None for stderr.
      progress: whether to show a progress bar.
      stop: asked after each step whether to save the run and raise `Stopped`.
      watch: of the other processes, is told what was done.

    Returns:
      The finished run.

    Raises:
      ValueError: something given does not fit, known before the first step; or the loss is not finite.
      Stopped: `stop` returned true, and the run is saved.
    """
    wall_time = WallTime()
    folder = config.open_folder()
    partitioner = partitioner_for(config)
    if not isinstance(partitioner, OneDevice):
        (say or say_nothing)(f"mesh: {MeshShape(*partitioner.mesh.devices.shape)}")
        if watch is not None:
            partitioner.on_batch = watch.work
    model = open_model(config, partitioner)
    run = Run(config, folder, model, partitioner, on_record=on_record, warn=warn, wall_time=wall_time)
    del model  # what is trained of it is then in memory once
    try:
        return _train(run, partitioner, say, warn or say_on_stderr, progress, stop, watch)
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
) -> Run:
    """Trains a run that has read everything; its folder is closed by the caller, however this ends."""
    for line in run.open():
        (say or say_nothing)(line)
    for line in run.go_back(max(run.saved_steps, default=0)):
        (say or warn)(line)
    member = Member(run)
    member.start()
    evaluator = Evaluator(run.size, run.tokenizer, partitioner)
    take_steps(
        [member],
        functools.partial(_own_program, partitioner=partitioner),
        lambda _: evaluator,
        say=say,
        progress=progress,
        stop=stop,
        saved=lambda: None if watch is None else setattr(watch, "saved_step", run.saved_step),
    )
    if member.failure is not None:
        raise member.failure
    if run.stop_reason:
        (say or say_nothing)(f"stopped at step {run.step}: {run.stop_reason}")
    return run


def _own_program(runs: Sequence[Run], partitioner: Partitioner | OneDevice) -> Step:
    """Returns the program of one run."""
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
        state, metrics = step(states[0], frozen, run.placed(batches[0]))
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
) -> None:
    """Trains runs that share a program until each is over or has failed. The program shrinks as runs end.

    Args:
      members: the runs, each where it was saved.
      program_of: returns the step of runs; they are those left of the members, or fewer.
      evaluator_of: returns what evaluates a run.
      say, progress, stop: as of `train`.
      saved: is called after each step, when the runs may have been saved.

    Raises:
      Stopped: `stop` returned true, and all runs are saved.
    """
    slots, step = [member for member in members if member.active], None
    steps = max((member.run.config.train_steps for member in slots), default=0)
    first = max((member.run.step for member in slots), default=0)
    hidden = None if progress and is_writer() else True  # None: shown if stderr is a terminal
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
                for member, state, own in zip(slots, states, metrics, strict=True):
                    member.state = state
                    if member.active:
                        with member.failing_alone():
                            member.after_step(own, evaluator_of(member.run), show)
            saved()
            taken = max(member.run.step for member in active)
            bar.update(taken - bar.n)
            left = [member for member in slots if member.active]
            if left and stop(taken):
                for member in left:
                    with member.failing_alone():
                        member.run.save()
                raise Stopped(f"terminated, saved at step {taken}: the same command goes on from there")


def _show(say: Say, bar: tqdm, line: str) -> None:
    if say is say_on_stderr:
        say_on_stderr(line, bar)
    else:
        say(line)


def program_size(active: int) -> int:
    """Returns how many slots a program for so many runs may keep: 1, 2, 3, 4, 6, 8, 12, ... A program of another size
    is another compilation, which one run less does not pay for."""
    sizes = sorted({2**n for n in range(12)} | {3 * 2**n for n in range(12)})
    return next(size for size in sizes if size >= active)


def open_model(config: TrainConfig, partitioner: Partitioner | OneDevice = ONE_DEVICE) -> Model:
    """Returns the base model that a run trains on, in its place on the mesh, with its tokenizer."""
    size, held = config.size, config.model
    if held is not None:
        parameters = partitioner.place(held.parameters)
        return Model(held.path, size, parameters, held.tokenizer, held.fingerprint, partitioner.gather_table)
    location = config.initial_checkpoint_path and resolve(config.initial_checkpoint_path)
    tokenizer = open_vocabulary(config.vocabulary, location, size)
    size = with_ids(size, tokenizer)
    if location:
        base = load_base(location, size, config.held_dtype, partitioner.parameter)
    else:
        base = random_base(size, config.random_seed, partitioner.parameter)
    return Model(base.path, size, base.params, tokenizer, base.fingerprint, partitioner.gather_table)


def check_unchanged(frozen: Params, before: str) -> None:
    """Raises RuntimeError if the frozen parameters no longer have the fingerprint `before`."""
    if fingerprint(frozen) != before:
        raise RuntimeError("the frozen parameters changed in memory")

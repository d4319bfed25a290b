"""Many prompt-tuning runs in one program: one frozen base, one compilation, many prompts.

What a run reads, evaluates and saves is `training.run`'s, as if it were alone.
"""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from prompt_tuning_jax.batches.loader import Batch
from prompt_tuning_jax.checkpoints.base import fingerprint
from prompt_tuning_jax.sweeps.joint_step import stacked, step_of
from prompt_tuning_jax.sweeps.programs import program_size, programs
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.loop import TERMINATED, check_unchanged, open_base
from prompt_tuning_jax.training.progress import Terminated
from prompt_tuning_jax.training.run import Run, TrainConfig
from prompt_tuning_jax.training.run_folder import write_text
from prompt_tuning_jax.training.step import StepMetrics


class Member:
    """A run's place in a program.

    Attributes:
      active: false once its run is over or has failed; its place in the program then computes on, for nothing.
      failure: why it failed.
    """

    def __init__(self, name: str, run: Run):
        self.name, self.run = name, run
        self.active, self.failure = True, None

    def start(self) -> None:
        self.state, self._stream = self.run.state, self.run.batches_to_come()
        if self.run.over:
            self.end()

    def next_batch(self) -> Batch:
        if self.active:
            self.batch = next(self._stream)
        return self.batch

    def after_step(self, metrics: StepMetrics, evaluator: Evaluator, bar: tqdm) -> None:
        self.run.after_step(self.state, self.batch.ids, metrics, evaluator, functools.partial(self.say, bar))
        if self.run.over:
            self.end()

    def say(self, bar: tqdm, line: str) -> None:
        bar.write(f"{self.name}: {line}", file=sys.stderr)

    def end(self) -> None:
        self.active = False
        summary = self.run.finish()
        best = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items())
        early = f"; stopped at step {self.run.step}: {self.run.stop_reason}" if self.run.stop_reason else ""
        print(f"{self.name}: best at step {summary['best_step']}: {best}{early}", file=sys.stderr)

    @contextlib.contextmanager
    def failing_alone(self) -> Iterator[None]:
        """What goes wrong with this run ends it, and no other."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.active, self.failure = False, " ".join(str(error).split())
            self.run.close()
            leave_failure(self.name, self.run.config.model_dir, self.failure)


def leave_failure(name: str, model_dir: str, failure: str) -> None:
    """Says what a run failed of, on stderr and in failed.txt of its folder."""
    print(f"{name}: error: {failure}", file=sys.stderr)
    with contextlib.suppress(OSError):  # of a full disk, say
        Path(model_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(model_dir, "failed.txt"), f"error: {failure}\n")


def train_together(configs: Iterable[tuple[str, TrainConfig]], most: int | None = None) -> dict[str, str]:
    """Trains runs of one `joint_key`.

    Args:
      configs: by name. Taken one at a time, each run having read all it needs of its settings before the next.
      most: see `programs.programs`.

    Returns:
      What failed, and of what, by name; the other runs have their summary.json.

    Raises:
      ValueError: the base does not fit; nothing has been written then.
    """
    members, failures, base = [], {}, None
    for name, config in configs:
        if base is None:
            base, words = open_base(config)
        try:
            members.append(Member(name, Run(config, config.open_folder(), base, words)))
        except (ValueError, OSError) as error:
            failures[name] = " ".join(str(error).split())
            leave_failure(name, config.model_dir, failures[name])
    if not members:
        return failures
    frozen, evaluators = members[0].run.frozen, {}
    before = fingerprint(frozen)
    of_run = {member.run: member for member in members}
    for program in programs([*of_run], most):
        _train([of_run[run] for run in program.runs], program.at_once, evaluators)
    check_unchanged(frozen, before)
    return failures | {member.name: member.failure for member in members if member.failure}


def _train(members: Sequence[Member], at_once: int, evaluators: dict[int, Evaluator]) -> None:
    """Trains members in one program, which shrinks as they end."""
    for member in members:
        with member.failing_alone():
            member.run.open()
    members = [member for member in members if member.active]
    for member, step in zip(members, common_steps([member.run for member in members]), strict=True):
        with member.failing_alone():
            member.run.go_back(step)
            member.start()
    places, step = [member for member in members if member.active], None
    steps = max((member.run.config.train_steps for member in places), default=0)
    with Terminated() as terminated, tqdm(total=steps, disable=None, unit="step") as bar:
        while active := [member for member in places if member.active]:
            if step is None or program_size(len(active)) < len(places):
                places = active
                step = step_of([member.run for member in places], at_once)
            inputs, targets = stacked([member.next_batch() for member in places])
            states = tuple(member.state for member in places)
            states, metrics = step(states, places[0].run.frozen, inputs, targets)
            for member, state, own in zip(places, states, metrics, strict=True):
                member.state = state
                if member.active:
                    length = member.run.config.prompt_length
                    if length not in evaluators:
                        evaluators[length] = Evaluator(member.run.model, member.run.words)
                    with member.failing_alone():
                        member.after_step(own, evaluators[length], bar)
            bar.n = max(member.run.step for member in active)
            bar.refresh()
            if terminated.by_signal:
                for member in places:
                    if member.active:
                        with member.failing_alone():
                            member.run.save()
                print("terminated, saved: the same command goes on from there", file=sys.stderr)
                sys.exit(TERMINATED)


def common_steps(runs: Sequence[Run]) -> Iterator[int]:
    """Where each run was saved; of runs that were killed while they were being saved, the last step that all have.

    They then take the same steps together as if they had never been killed, to the last bit.
    """
    newest = [max(run.saved_steps, default=0) for run in runs]
    least = min(newest, default=0)
    for run, step in zip(runs, newest, strict=True):
        close = step - least <= run.config.eval_period
        yield least if close and (least in run.saved_steps or not least) else step

"""Trains many runs in one executable, with one frozen base model and one prompt or adapter per run.

Each run reads, evaluates and saves as if it were alone, with `training.run`; the loop is that of `training.loop`.
"""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prompt_tuning_jax.batches.cache import to_stderr
from prompt_tuning_jax.errors import error_text
from prompt_tuning_jax.sweeps.run_groups import programs
from prompt_tuning_jax.sweeps.shared_step import program_of
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.loop import Member, open_model, say_on_stderr, take_steps
from prompt_tuning_jax.training.progress import Stop
from prompt_tuning_jax.training.run import Run, Say, TrainConfig
from prompt_tuning_jax.training.run_folder import write_text
from prompt_tuning_jax.training.wall_time import WallTime


def one_line(error: Exception) -> str:
    """Returns an error's message as one line, in which settings have the names of gin macros."""
    return " ".join(error_text(error, str.upper).split())


def write_failure(name: str, model_dir: str, failure: str) -> None:
    """Writes why a run failed to stderr and to failed.txt in its folder."""
    print(f"{name}: error: {failure}", file=sys.stderr)
    with contextlib.suppress(OSError):  # for example, the disk is full
        Path(model_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(model_dir, "failed.txt"), f"error: {failure}\n")


def train_together(
    configs: Iterable[tuple[str, TrainConfig]], most: int | None = None, *, stop: Stop = lambda step: False
) -> dict[str, str]:
    """Trains runs that have equal `program_key`s.

    Args:
      configs: names and configurations. They are read one at a time: each run has read all it needs of its
        configuration before the next is made.
      most: see `run_groups.programs`.
      stop: see `loop.train`.

    Returns:
      The reasons of the runs that failed, by name. All other runs have written their summary.json.

    Raises:
      ValueError: the base model does not fit the configuration. Nothing has been written then.
      Stopped: `stop` returned true. All runs have been saved.
    """
    members, failures, model, wall_time = [], {}, None, WallTime()
    warn = without_repeats(to_stderr)
    for name, config in configs:
        if model is None:
            model = open_model(config)
        with recording_failure(name, str(config.model_dir), failures):
            run = Run(config, config.open_folder(), model, warn=warn, wall_time=wall_time)
            members.append(Member(run, name, report))
    del model
    if not members:
        return failures
    evaluator = Evaluator(members[0].run.size, members[0].run.tokenizer)
    of_run = {member.run: member for member in members}
    for program in programs([*of_run], most):
        together = [of_run[run] for run in program.runs]
        try:
            open_all(together)
            take_steps(
                together,
                functools.partial(program_of, at_once=program.at_once),
                lambda run: evaluator,
                say=say_on_stderr,
                progress=True,
                stop=stop,
            )
        finally:
            for member in together:
                member.run.abandon()
        for member in together:
            if member.failure is not None:
                failures[member.name] = one_line(member.failure)
    return failures


def without_repeats(say: Say) -> Say:
    """Returns a function that calls `say` only for new lines, since runs on the same data give the same warnings."""
    printed: set[str] = set()

    def say_once(line: str) -> None:
        if line not in printed:
            printed.add(line)
            say(line)

    return say_once


@contextlib.contextmanager
def recording_failure(name: str, model_dir: str, failures: dict[str, str]) -> Iterator[None]:
    """Records an error of one run in `failures` and in its failed.txt, instead of raising it."""
    try:
        yield
    except (ValueError, OSError) as error:
        failures[name] = one_line(error)
        write_failure(name, model_dir, failures[name])


def open_all(members: Sequence[Member]) -> None:
    """Opens the runs' folders, and restores each run at the step that `common_steps` chooses."""
    for member in members:
        with member.isolating_failure():
            for line in member.run.open():
                member.named(say_on_stderr)(line)
    members = [member for member in members if member.active]
    for member, step in zip(members, common_steps([member.run for member in members]), strict=True):
        with member.isolating_failure():
            for line in member.run.restore_to(step):
                member.named(say_on_stderr)(line)
            member.start()


def report(member: Member) -> None:
    """Prints a run's best step and metrics, or why it failed."""
    if member.failure is not None:
        write_failure(member.name, str(member.run.config.model_dir), one_line(member.failure))
        return
    run, summary = member.run, member.summary
    best = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items())
    early = f"; stopped at step {run.step}: {run.stop_reason}" if run.stop_reason else ""
    print(f"{member.name}: best at step {summary['best_step']}: {best}{early}", file=sys.stderr)


def common_steps(runs: Sequence[Run]) -> Iterator[int]:
    """Yields, per run, the saved step from which it resumes.

    If the runs were killed during a save, some of them have a newer checkpoint than others. These restore the last step
    that all have, so that the runs again take every step together, and their results are bit-identical to those of
    runs that were never killed.
    """
    newest = [max(run.saved_steps, default=0) for run in runs]
    least = min(newest, default=0)
    for run, step in zip(runs, newest, strict=True):
        close = step - least <= run.config.eval_period
        yield least if close and (least in run.saved_steps or not least) else step

"""Many runs in one program: one frozen base model, one compilation, many prompts or adapters.

What a run reads, evaluates and saves is `training.run`'s, and the loop is `training.loop`'s, as if it were alone.
"""

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from prompt_tuning_jax.batches.cache import to_stderr
from prompt_tuning_jax.errors import spelled
from prompt_tuning_jax.sweeps.run_groups import programs
from prompt_tuning_jax.sweeps.shared_step import program_of
from prompt_tuning_jax.training.evaluation import Evaluator
from prompt_tuning_jax.training.loop import Member, open_model, say_on_stderr, take_steps
from prompt_tuning_jax.training.progress import Stop
from prompt_tuning_jax.training.run import Run, Say, TrainConfig
from prompt_tuning_jax.training.run_folder import write_text


def in_a_line(error: Exception) -> str:
    """Returns an error's message in one line, with settings named as the macros that a sweep sets."""
    return " ".join(spelled(error, str.upper).split())


def leave_failure(name: str, model_dir: str, failure: str) -> None:
    """Says what a run failed of, on stderr and in failed.txt of its folder."""
    print(f"{name}: error: {failure}", file=sys.stderr)
    with contextlib.suppress(OSError):  # of a full disk, say
        Path(model_dir).mkdir(parents=True, exist_ok=True)
        write_text(Path(model_dir, "failed.txt"), f"error: {failure}\n")


def train_together(
    configs: Iterable[tuple[str, TrainConfig]], most: int | None = None, *, stop: Stop = lambda step: False
) -> dict[str, str]:
    """Trains runs of one `program_key`.

    Args:
      configs: by name. Taken one at a time, each run having read all it needs of its settings before the next.
      most: see `run_groups.programs`.
      stop: see `loop.train`.

    Returns:
      What failed, and why, by name; the other runs have their summary.json.

    Raises:
      ValueError: the base model does not fit; nothing has been written then.
      Stopped: `stop` returned true, and all runs are saved.
    """
    members, failures, model = [], {}, None
    warn = once(to_stderr)
    for name, config in configs:
        if model is None:
            model = open_model(config)
        with failing(name, str(config.model_dir), failures):
            members.append(Member(Run(config, config.open_folder(), model, warn=warn), name, report))
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
                failures[member.name] = in_a_line(member.failure)
    return failures


def once(say: Say) -> Say:
    """Returns `say` for lines that it has not been told yet: runs on the same data have the same to say of it."""
    told: set[str] = set()

    def say_once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    return say_once


@contextlib.contextmanager
def failing(name: str, model_dir: str, failures: dict[str, str]) -> Iterator[None]:
    """Keeps what goes wrong with one run among the failures."""
    try:
        yield
    except (ValueError, OSError) as error:
        failures[name] = in_a_line(error)
        leave_failure(name, model_dir, failures[name])


def open_all(members: Sequence[Member]) -> None:
    """Makes the runs' folders, and restores each run as it was saved."""
    for member in members:
        with member.failing_alone():
            for line in member.run.open():
                member.named(say_on_stderr)(line)
    members = [member for member in members if member.active]
    for member, step in zip(members, common_steps([member.run for member in members]), strict=True):
        with member.failing_alone():
            for line in member.run.go_back(step):
                member.named(say_on_stderr)(line)
            member.start()


def report(member: Member) -> None:
    """Says how a run ended."""
    if member.failure is not None:
        leave_failure(member.name, str(member.run.config.model_dir), in_a_line(member.failure))
        return
    run, summary = member.run, member.summary
    best = ", ".join(f"{name} {value:.4g}" for name, value in summary["best"].items())
    early = f"; stopped at step {run.step}: {run.stop_reason}" if run.stop_reason else ""
    print(f"{member.name}: best at step {summary['best_step']}: {best}{early}", file=sys.stderr)


def common_steps(runs: Sequence[Run]) -> Iterator[int]:
    """Yields the step at which each run was saved; of runs that were killed while they were being saved, the last step
    that all have.

    They then take the same steps together as if they had never been killed, to the last bit.
    """
    newest = [max(run.saved_steps, default=0) for run in runs]
    least = min(newest, default=0)
    for run, step in zip(runs, newest, strict=True):
        close = step - least <= run.config.eval_period
        yield least if close and (least in run.saved_steps or not least) else step

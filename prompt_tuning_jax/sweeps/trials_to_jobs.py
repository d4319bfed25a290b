"""Divides the trials of a sweep into jobs: decides which trials get their own process, and which share one."""

from collections.abc import Callable, Hashable, Sequence

from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.spec import Trial

CLUSTER_TRIALS = 8  # trials per job if VECTORIZE is 'auto' and the launcher starts all jobs at once


def plan(
    trials: Sequence[Trial],
    key: Callable[[Trial], Hashable | None],
    command_line_of: Callable[[Sequence[Trial]], Sequence[str]],
    vectorize: bool | int | str,
    processes: int | None,
) -> list[Job]:
    """Returns the jobs that run these trials. Only trials with equal keys can share a job.

    Args:
      key: returns a trial's key, or None if the trial must run alone; see `shared_step.program_key`.
      command_line_of: returns the command line that runs several trials.
      vectorize: the sweep's setting; see `spec.Sweep`.
      processes: how many jobs run at the same time; None if all do.
    """
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        shared = key(trial) if vectorize is not False else None
        groups.setdefault(trial.name if shared is None else (shared,), []).append(trial)
    jobs: list[Job] = []
    for group in groups.values():
        for part in _divide(group, vectorize, processes):
            line = part[0].command_line if len(part) == 1 else command_line_of(part)
            jobs.append(Job(f"{len(jobs):03d}", tuple(part), line))
    return jobs


def most_together(vectorize: bool | int | str) -> int | None:
    """Returns the largest number of trials in one executable, or None if memory and padding decide."""
    return None if isinstance(vectorize, (bool, str)) else vectorize


def _divide(group: Sequence[Trial], vectorize: bool | int | str, processes: int | None) -> list[Sequence[Trial]]:
    size = most_together(vectorize) or (CLUSTER_TRIALS if processes is None else -(-len(group) // processes))
    return [group[start : start + size] for start in range(0, len(group), size)]

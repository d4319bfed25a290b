"""From trials to jobs: which trials a process of their own runs, and which share one."""

from collections.abc import Callable, Hashable, Sequence

from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.spec import Trial

CLUSTER_TRIALS = 8  # of a job, where VECTORIZE is 'auto' and the jobs run elsewhere, at once


def plan(
    trials: Sequence[Trial],
    key: Callable[[Trial], Hashable | None],
    together: Callable[[Sequence[Trial]], Sequence[str]],
    vectorize: bool | int | str,
    processes: int | None,
) -> list[Job]:
    """The jobs that run these trials; those of one key share jobs.

    Args:
      key: of a trial, None where it runs alone; see `shared_step.program_key`.
      together: the command line that runs several trials.
      vectorize: the sweep's.
      processes: how many jobs are to run at once; None for as many as there are.
    """
    groups: dict[Hashable, list[Trial]] = {}
    for trial in trials:
        shared = key(trial) if vectorize is not False else None
        groups.setdefault(trial.name if shared is None else (shared,), []).append(trial)
    jobs: list[Job] = []
    for group in groups.values():
        for part in _parts(group, vectorize, processes):
            line = part[0].command_line if len(part) == 1 else together(part)
            jobs.append(Job(f"{len(jobs):03d}", tuple(part), line))
    return jobs


def most_together(vectorize: bool | int | str) -> int | None:
    """The most trials in one program; None where memory and padding decide."""
    return None if isinstance(vectorize, (bool, str)) else vectorize


def _parts(group: Sequence[Trial], vectorize: bool | int | str, processes: int | None) -> list[Sequence[Trial]]:
    size = most_together(vectorize) or (CLUSTER_TRIALS if processes is None else -(-len(group) // processes))
    return [group[at : at + size] for at in range(0, len(group), size)]

"""Runs the jobs of a sweep on a Slurm cluster, as one job array, with submitit."""

import contextlib
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from prompt_tuning_jax.batches.lock import lock, running
from prompt_tuning_jax.command_line import TERMINATED
from prompt_tuning_jax.settings import MappingOf, Name, Settings, check_fields
from prompt_tuning_jax.sweeps import status
from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers import tether

CLUSTERS = ("slurm", "local")
PARAMETERS = {"name": "sweep", "timeout_min": 24 * 60, "gpus_per_node": 1, "tasks_per_node": 1}
MOST_TIMEOUTS = 100  # how often a job may reach its time limit; each time it goes back to the queue
LAST_LINES = 20  # how many of a log's last lines are copied to failed.txt
# Slurm sends SIGTERM both to training and to the task that started it. Only later does it show whether the job was
# preempted (SIGUSR2, or Slurm's own requeue) or cancelled (SIGKILL). The task waits this long for that.
VERDICT_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Runs the jobs as a Slurm job array with one task per job.

    A job that is preempted or reaches its time limit saves, goes back to the queue, and resumes from there. A job that
    loses its node also goes back to the queue, and resumes from its last checkpoint.

    Attributes:
      parameters: arguments of submitit's `AutoExecutor.update_parameters`, which override `PARAMETERS`: timeout_min,
        gpus_per_node, cpus_per_task, mem_gb, slurm_partition, slurm_account, slurm_array_parallelism, slurm_setup, ...
      cluster: "slurm", or "local" for submitit's local executor, which starts all jobs at once on this machine and
        waits for them. To divide this machine among the jobs, use --launcher=local instead.
    """

    parameters: Annotated[Settings, MappingOf()] = dataclasses.field(default_factory=dict)
    cluster: Name = "slurm"

    def __post_init__(self):
        check_fields(self)

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Submits the jobs to the queue. SWEEP_DIR must be on a disk that all nodes share.

        Args:
          sweep_dir: the sweep's folder. The stdout and stderr of each job go to `logs/<job>.log` in it, and submitit's
            files to `logs/submitit`.

        Returns:
          0; with the local cluster, 1 if a job failed.

        Raises:
          ValueError: submitit or Slurm is not installed, or one of them refuses the parameters.
        """
        executor = self._executor(Path(sweep_dir, "logs", "submitit"))
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with executor.batch():
                submitted = [executor.submit(Run(job, str(Path(sweep_dir).resolve()))) for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise ValueError(f"sbatch refused the jobs: {_last_line(str(error))}; set Slurm.parameters") from None
        if self.cluster == "local":
            return _wait_for(jobs, submitted)
        array = submitted[0].job_id.partition("_")[0]
        print(f"Slurm has {len(jobs)} jobs as {array}: `scancel {array}` stops them, `sweep --status` shows them")
        return 0

    def _executor(self, folder: Path) -> Any:
        try:
            import submitit
        except ModuleNotFoundError:
            raise ValueError("submitit is not installed: pip install 'prompt_tuning_jax[slurm]'") from None
        if self.cluster not in CLUSTERS:
            raise ValueError(f"Slurm.cluster is {self.cluster!r}, expected one of {', '.join(CLUSTERS)}")
        for program in ("sbatch", "srun") if self.cluster == "slurm" else ():
            if shutil.which(program) is None:
                raise ValueError(
                    f"no {program} on PATH: start the sweep on a login node of a Slurm cluster, or choose "
                    "--launcher=local for this machine"
                )
        parameters = PARAMETERS | dict(self.parameters)
        own = parameters.get("slurm_additional_parameters") or {}
        # Whether Slurm requeues a job after preemption or a node failure depends on the cluster, so ask for it.
        parameters["slurm_additional_parameters"] = {"requeue": True, **own}
        try:
            most = {f"{cluster}_max_num_timeout": MOST_TIMEOUTS for cluster in CLUSTERS}
            executor = submitit.AutoExecutor(folder / "%j", cluster=self.cluster, **most)
            executor.update_parameters(**parameters)
        except (NameError, AssertionError, TypeError, ValueError) as error:  # as submitit finds them
            raise ValueError(f"Slurm.parameters: {str(error).partition('Valid')[0].strip()}") from None
        return executor


class Run:
    """Runs one job as a child process and waits for it; this is one task of the array.

    submitit calls `checkpoint` in a signal handler if the job is preempted or reaches its time limit.
    """

    def __init__(self, job: Job, sweep_dir: str):
        self._job, self._sweep_dir = job, sweep_dir
        self._pid: int | None = None

    def __call__(self) -> None:
        with contextlib.ExitStack() as marks:
            for trial in self._job.trials:
                mark = trial.folder / status.RUNNING
                # After a node fails, the lock that it held still looks alive for a while.
                again = "SLURM_RESTART_COUNT" in os.environ
                marks.enter_context(lock(mark) if again and mark.exists() else running(trial.folder))
                (trial.folder / status.FAILED).unlink(missing_ok=True)
            log = Path(self._sweep_dir, "logs", f"{self._job.name}.log")
            with open(log, "ab") as file:
                file.write(f"$ {shlex.join(self._job.command_line)}\n".encode())
                file.flush()
                begin = file.tell()
                code = self._run(file)
            if code == TERMINATED and "SLURM_JOB_ID" in os.environ:
                time.sleep(VERDICT_SECONDS)
            if code and code != TERMINATED:
                self._write_failure(log, begin, code)
        if code:
            raise RuntimeError(f"job {self._job.name} exited with {code}: see {log}")

    def checkpoint(self) -> Any:
        """Makes the child save and exit, and returns the submission that puts the job back into the queue."""
        from submitit.helpers import DelayedSubmission

        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if self._pid is not None:
                os.kill(self._pid, signal.SIGTERM)
                # WNOWAIT leaves the child to be reaped by `_run`, whose wait this handler may have interrupted.
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Run(self._job, self._sweep_dir))

    def _run(self, log: Any) -> int:
        program, *arguments = self._job.command_line
        command = [sys.executable if program == "python" else program, *arguments]
        environment = {
            "PYTHONUNBUFFERED": "1",  # otherwise the last lines are lost if the process is killed
            "JAX_TRACEBACK_FILTERING": "off",  # otherwise JAX's note about filtering is the last line of a traceback
            **os.environ,
        }
        # Slurm sends SIGUSR2 to every process of the job. The child inherits the blocked signal, which otherwise would
        # end training before it has saved.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), "", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self._pid = process.pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            self._pid = None

    def _write_failure(self, log: Path, begin: int, code: int) -> None:
        """Writes the last lines of the log to failed.txt of each unfinished trial that does not have one yet."""
        with open(log, "rb") as file:
            file.seek(max(begin, log.stat().st_size - 200 * LAST_LINES))
            lines = file.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        if code < 0 or not lines:
            lines.append(f"killed by signal {-code}" if code < 0 else f"exited with {code}, and said nothing")
        for trial in self._job.trials:
            failed = trial.folder / status.FAILED
            if not failed.exists() and not status.is_finished(trial):
                failed.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _wait_for(jobs: Sequence[Job], submitted: Sequence[Any]) -> int:
    from submitit.core.utils import UncompletedJobError

    failed = 0
    for job, one in zip(jobs, submitted, strict=True):
        try:
            error = one.exception()
        except UncompletedJobError as uncompleted:  # it was killed before it could report an error
            error = uncompleted
        if error is not None:
            failed += 1
            print(f"job {job.name} failed: {_last_line(str(error))}")
    return 1 if failed else 0


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[-1] if lines else "it said nothing"

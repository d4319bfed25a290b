"""Runs the jobs of a sweep on this machine, several at a time, with the devices or cores divided among them."""

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from prompt_tuning_jax.batches.lock import running
from prompt_tuning_jax.command_line import TERMINATED
from prompt_tuning_jax.errors import Setting, SettingError
from prompt_tuning_jax.settings import Count, check_fields
from prompt_tuning_jax.sweeps import status
from prompt_tuning_jax.sweeps.jobs import Job
from prompt_tuning_jax.sweeps.launchers import tether
from prompt_tuning_jax.sweeps.launchers.devices import Slot, divide_machine
from prompt_tuning_jax.sweeps.spec import Trial

POLL_SECONDS = 0.1  # between two checks of the processes
REDRAW_SECONDS = 2.0  # between two reads of the trials' folders
LAST_LINES = 20  # how many of a log's last lines are copied to failed.txt
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Local:
    """Starts jobs as processes on this machine, and waits for them.

    Attributes:
      processes: the number of jobs that run at the same time. None for one per visible GPU or TPU chip, or one if there
        are none.
    """

    processes: Count | None = None

    def __post_init__(self):
        check_fields(self)

    @property
    def at_once(self) -> int:
        """Returns how many jobs run at the same time if there are enough of them."""
        return len(divide_machine(self.processes, sys.maxsize))

    def launch(self, jobs: Sequence[Job], sweep_dir: str) -> int:
        """Runs the jobs and waits for them.

        After SIGINT, SIGTERM or SIGHUP the jobs save and exit; a further SIGINT kills them. If a job dies, the last
        lines of its log are written to failed.txt of its unfinished trials, and the other jobs continue. On Linux no
        job outlives this process, even if this process is killed.

        Args:
          sweep_dir: the sweep's folder. The stdout and stderr of each job go to `logs/<job>.log` in it.

        Returns:
          0 if all trials are finished, 1 if not, and 128 plus the signal's number if a signal stopped the jobs.

        Raises:
          ValueError: another launcher runs this sweep, `sweep_dir` cannot be written, or there are too few TPU chips.
        """
        slots = divide_machine(self.processes, len(jobs))
        folder = Path(sweep_dir)
        try:
            with running(folder), _StopSignals() as stop:
                (folder / "logs").mkdir(exist_ok=True)
                view = _View([trial for job in jobs for trial in job.trials], sys.stderr)
                all_finished = _run(jobs, slots, folder / "logs", stop, view)
        except OSError as error:
            raise SettingError(
                f"cannot go on in {sweep_dir} ({error.strerror or error}: {error.filename or 'a log'}): free disk "
                "space, or set ",
                Setting("sweep_dir"),
                " to a folder that can be written; the same command then goes on",
            ) from None
        if stop.signal:
            return 128 + stop.signal
        return 0 if all_finished else 1


class _Running(NamedTuple):
    """Holds a running job, its slot, its process, and the offset in its log at which this start's lines begin."""

    job: Job
    slot: Slot
    process: subprocess.Popen
    log: Path
    begin: int
    marks: contextlib.ExitStack


class _StopSignals:
    """Records the stop signals that arrive in this context. Signals that were ignored (nohup, `&`) stay ignored.

    Attributes:
      signal: the number of the first signal that arrived, or None.
      kill: whether a SIGINT arrived after it.
    """

    signal: int | None = None
    kill = False

    def __enter__(self) -> "_StopSignals":
        handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGTSTP)}
        self._before = {number: before for number, before in handlers.items() if before not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._record)
        return self

    def _record(self, number: int, _: Any) -> None:
        if number == signal.SIGTSTP:
            return  # Ctrl-Z would stop only the launcher; its running jobs would then look as if nothing ran them
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            self.kill = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _run(jobs: Sequence[Job], slots: Sequence[Slot], logs: Path, stop: _StopSignals, view: "_View") -> bool:
    """Runs the jobs, and returns whether all their trials are finished.

    Raises:
      OSError: a log cannot be written. All jobs have ended when this is raised.
    """
    waiting, free, active = collections.deque(jobs), list(slots), list[_Running]()
    all_finished, stopping = True, False
    try:
        while active or (waiting and not stop.signal):
            while waiting and free and not stop.signal:
                job, slot = waiting.popleft(), free.pop(0)
                try:
                    active.append(_start(job, slot, logs))
                except ValueError as error:  # another process runs one of its trials
                    view.say(str(error))
                    free.append(slot)
                    all_finished = False
                view.look(job.trials)
            if stop.signal and not stopping:
                _terminate(active)
                what = "1 job saves and ends; Ctrl-C kills it"
                if len(active) != 1:
                    what = f"{len(active)} jobs save and end; Ctrl-C kills them"
                view.say(f"{_signal_name(stop.signal)}: {what}")
                stopping = True
            if stop.kill:
                _kill(active)
            for job_run in [job_run for job_run in active if job_run.process.poll() is not None]:
                active.remove(job_run)
                free.append(job_run.slot)
                all_finished &= _finish_job(job_run, stop, view)
            view.show([trial for job_run in active for trial in job_run.job.trials])
            time.sleep(POLL_SECONDS)
    finally:
        _terminate(active)  # `active` is empty here unless an exception was raised
        while active and any(job_run.process.poll() is None for job_run in active) and not stop.kill:
            time.sleep(POLL_SECONDS)
        _kill(active)
        for job_run in active:
            job_run.process.wait()
            job_run.marks.close()
        view.close()
    return all_finished


def _start(job: Job, slot: Slot, logs: Path) -> _Running:
    program, *arguments = job.command_line
    command = [sys.executable if program == "python" else program, *arguments]
    environment = {
        "PYTHONUNBUFFERED": "1",  # otherwise the last lines are lost if the process is killed
        "JAX_TRACEBACK_FILTERING": "off",  # otherwise JAX's note about filtering is the last line of a traceback
        **os.environ,
        **slot.environment,
    }
    with contextlib.ExitStack() as marks:
        for trial in job.trials:
            marks.enter_context(running(trial.folder))
            (trial.folder / status.FAILED).unlink(missing_ok=True)
        log = logs / f"{job.name}.log"
        with open(log, "ab") as file:
            file.write(f"$ {shlex.join(job.command_line)}\n".encode())
            file.flush()
            begin = file.tell()
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), slot.cores, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,  # so that Ctrl-C in the terminal reaches only the launcher
            )
            return _Running(job, slot, process, log, begin, marks.pop_all())


def _terminate(active: Sequence[_Running]) -> None:
    for job_run in active:
        job_run.process.terminate()


def _kill(active: Sequence[_Running]) -> None:
    """Kills the jobs and all processes that they started.

    Each job leads a process group. The group's number stays valid until the job has been waited for.
    """
    for job_run in active:
        if job_run.process.poll() is None:
            os.killpg(job_run.process.pid, signal.SIGKILL)


def _finish_job(job_run: _Running, stop: _StopSignals, view: "_View") -> bool:
    """Writes failed.txt for the unfinished trials of a job that failed; returns whether all its trials are finished."""
    job_run.marks.close()
    code = job_run.process.returncode
    unfinished = [trial for trial in job_run.job.trials if not status.is_finished(trial)]
    if code not in (TERMINATED, -signal.SIGTERM) and not (stop.kill and code == -signal.SIGKILL):
        for trial in unfinished:
            try:
                with open(trial.folder / status.FAILED, "x", encoding="utf-8") as file:
                    file.write(_last_lines(job_run, code))
            except FileExistsError:
                continue  # the job's own process wrote it, with a better reason
            except OSError as error:
                view.say(f"{trial.name}: job {job_run.job.name} exited with {code}, and {error}")
    view.look(job_run.job.trials)
    return not unfinished


def _last_lines(job_run: _Running, code: int) -> str:
    with open(job_run.log, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(job_run.begin, end - 200 * LAST_LINES))
        lines = file.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        lines.append(f"killed by {_signal_name(-code)}{memory}")
    elif code == 0:
        lines.append(f"exited with 0, but left no {status.SUMMARY}")
    elif not lines:
        lines.append(f"exited with {code}, and said nothing")
    return "\n".join(lines) + "\n"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


class _View:
    """Shows the states of the trials: as a table that is redrawn on a terminal, otherwise as a line per change."""

    def __init__(self, trials: Sequence[Trial], stream: TextIO):
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._states = {trial.name: status.trial_state(trial) for trial in trials}
        self._drawn = 0  # lines
        self._next = 0.0

    def look(self, trials: Sequence[Trial]) -> None:
        """Reads the current states of these trials, and reports changes if there is no terminal."""
        for trial in trials:
            before = now = self._states[trial.name]
            with contextlib.suppress(OSError):  # a shared disk may be unavailable for a moment
                now = self._states[trial.name] = status.trial_state(trial)
            if before.state != now.state and not self._live:
                self.say(status.describe(now))
        self._next = min(self._next, time.monotonic() + POLL_SECONDS)

    def show(self, trials: Sequence[Trial]) -> None:
        """Reads the states of the running trials and draws the table, at most once per REDRAW_SECONDS."""
        if time.monotonic() < self._next:
            return
        self.look(trials)
        self._next = time.monotonic() + REDRAW_SECONDS
        self._draw()

    def say(self, line: str) -> None:
        """Prints a line, which stays above the table."""
        with contextlib.suppress(OSError):  # the terminal is closed, but the jobs have yet to save
            self._clear()
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Prints the final table on a terminal, otherwise the final counts."""
        if self._live:
            self._draw()
        else:
            self.say(status.counts([*self._states.values()]))

    def _draw(self) -> None:
        if not self._live:
            return
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(self._stream.fileno())
            text = status.table([*self._states.values()], (size.columns or 80) - 1, (size.lines or 24) - 1)
            self._clear()
            print(text, file=self._stream, flush=True)
            self._drawn = text.count("\n") + 1

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

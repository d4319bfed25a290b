"""Runs a command that is killed if its parent process ends: `python tether.py PARENT CORES COMMAND ...`.

It is a program of its own because subprocess's `preexec_fn` is unsafe if the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from linux/prctl.h; the setting survives exec


def main(parent: str, cores: str, *command: str) -> None:
    """Replaces this process by the command, after tying its life to the parent's.

    Args:
      parent: pid of the parent process. The parent's thread that started this process must not end before the command.
      cores: the CPU cores that the command may use, such as "0,1"; "" for all.
      command: the program and its arguments.
    """
    if sys.platform == "linux":
        # SIGKILL, because a process that ignores a milder signal would keep its device; a killed run can be resumed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    if os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")  # it ended before prctl was called
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])

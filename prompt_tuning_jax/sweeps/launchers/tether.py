"""Becomes a command that cannot outlive the process that starts it: `python tether.py PARENT CORES COMMAND ...`.

A program of its own, and not what a child does before it runs its command, since that is unsafe beside threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; it holds over exec


def main(parent: str, cores: str, *command: str) -> None:
    """Args:
    parent: pid of the process whose end is this one's. Its thread that starts this one must not end before it.
    cores: "0,1" for the only ones to run on; "" for all.
    """
    if sys.platform == "linux":
        # SIGKILL, since what does not end by itself would stay behind with a device; a run resumes after it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    if os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")  # before the line above took hold
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])

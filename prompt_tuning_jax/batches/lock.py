"""One process at a time: a lock that is a file, so that it holds between hosts that share a disk."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DEAD_AFTER = 60.0  # seconds without a sign of life


@contextlib.contextmanager
def lock(
    path: Path, waiting: Callable[[str], None] = lambda owner: None, *, dead_after: float = DEAD_AFTER
) -> Iterator[None]:
    """Holds the lock `path`, after waiting for its owner.

    The file names its owner's process and host, and is touched while it lives. An owner is taken for dead where its
    process is gone from this host, or the file has not been touched for `dead_after` seconds of our own clock.
    Two that find the same owner dead at the same moment may both go on: what they do must bear it.

    Args:
      waiting: told once, before waiting, of the owner: "process 12 on host a".

    Raises:
      OSError: the file cannot be written.
    """
    while not _take(path):
        _wait(path, waiting, dead_after)
    released = threading.Event()

    def live() -> None:
        while not released.wait(dead_after / 6):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=live, daemon=True).start()
    try:
        yield
    finally:
        released.set()
        with contextlib.suppress(OSError):
            path.unlink()


def _take(path: Path) -> bool:
    try:
        with open(path, "x") as file:
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)  # the disk is full: it must not look held
        raise
    return True


def _wait(path: Path, waiting: Callable[[str], None], dead_after: float) -> None:
    """Until the lock is released, or its owner is dead and the lock removed."""
    told, seen, since = False, None, time.monotonic()
    while True:
        try:
            now, text = path.stat().st_mtime_ns, path.read_text()
        except FileNotFoundError:
            return
        if (now, text) != seen:
            seen, since = (now, text), time.monotonic()
        try:
            owner = json.loads(text)
            gone = owner["host"] == socket.gethostname() and not _lives(owner["pid"])
            name = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):  # it is just being written, or was cut short
            gone, name = False, "another process"
        if gone or time.monotonic() - since > dead_after:
            path.unlink(missing_ok=True)
            return
        if not told:
            waiting(name)
            told = True
        time.sleep(min(0.2, dead_after / 10))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

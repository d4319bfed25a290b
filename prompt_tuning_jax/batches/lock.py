"""Implements a lock as a file, so that it also works between hosts that share a disk."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEAD_AFTER = 60.0  # seconds after which an untouched lock counts as abandoned
RUNNING = "running"  # the name of the lock in the folder of a run or sweep

_lent: set[str] = set()  # folders that this process has marked, and whose mark a run in this process may take over


@contextlib.contextmanager
def lock(
    path: Path, waiting: Callable[[str], None] = lambda owner: None, *, dead_after: float = DEAD_AFTER
) -> Iterator[None]:
    """Holds the lock file `path` in this context. Waits first if another owner holds it.

    The file has the process id and host of its owner, which touches it regularly. An owner counts as dead if its
    process on this host has ended, or if the file has not been touched for `dead_after` seconds by this process's
    clock. If two processes find the same owner dead at the same moment, both may take the lock, so the work under the
    lock must be safe to do twice.

    Args:
      path: the lock file.
      waiting: is called once before waiting, with the owner's name: "process 12 on host a".
      dead_after: seconds after which an untouched lock counts as abandoned.

    Raises:
      OSError: the file cannot be written.
    """
    while not _take(path):
        _wait(path, waiting, dead_after)
    released = threading.Event()

    def touch() -> None:
        while not released.wait(dead_after / 6):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        released.set()
        with contextlib.suppress(OSError):
            path.unlink()


def _take(path: Path) -> bool:
    try:
        with open(path, "x") as file:
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}))
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)  # the disk is full: do not leave an empty lock
        raise
    return True


def _wait(path: Path, waiting: Callable[[str], None], dead_after: float) -> None:
    """Waits until the lock is released, or until its owner is dead, and then removes the lock."""
    notified, seen, since = False, None, time.monotonic()
    while True:
        try:
            now, text = path.stat().st_mtime_ns, path.read_text()
        except FileNotFoundError:
            return
        if (now, text) != seen:
            seen, since = (now, text), time.monotonic()
        try:
            owner = json.loads(text)
            gone = owner["host"] == socket.gethostname() and not _is_alive(owner["pid"], owner.get("started"))
            name = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):  # the file is being written, or is truncated
            gone, name = False, "another process"
        if gone or time.monotonic() - since > dead_after:
            _remove(path, text)
            return
        if not notified:
            waiting(name)
            notified = True
        time.sleep(min(0.2, dead_after / 10))


def _is_alive(pid: int, started: Any = None) -> bool:
    """Returns whether a process of this host lives. `started` tells it from a later process with the same id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return started is None or now is None or started == now


def _started(pid: int) -> int | None:
    """Returns when a process was started, in clock ticks since this host booted; None if the system does not say."""
    try:
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _remove(path: Path, text: str) -> None:
    """Removes a dead owner's lock, unless another process has taken the lock in the meantime."""
    moved = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, moved)
        if moved.read_text() != text:
            with contextlib.suppress(OSError):
                os.link(moved, path)
        moved.unlink()


class Owner(NamedTuple):
    """Names the process that holds a lock."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def owner(mark: Path) -> Owner | None:
    """Returns the live owner of a lock, on this host or on one that shares the disk; None if there is none."""
    try:
        age, text = time.time() - mark.stat().st_mtime, mark.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _owner(text, age)


def _owner(text: str, age: float) -> Owner | None:
    started = None
    try:
        fields = json.loads(text)
        started = fields.pop("started", None)
        found = Owner(**fields)
    except (ValueError, TypeError, AttributeError):  # the file is being written, or is truncated
        found = Owner(0, "an unknown host")
    if found.host == socket.gethostname():
        if not _is_alive(found.pid, started):
            return None
        if started is not None and _started(found.pid) == started:
            return found  # whatever the file's age: the owner may have been suspended for long
    # Without a known start the age decides even if the pid lives, which may be another process after a reboot.
    return found if age <= DEAD_AFTER else None


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Marks the folder of a trial or sweep as being run by this process, until the context ends or the process dies.

    If this process's parent has marked the folder, the parent's mark is kept. A run in this process may take over the
    mark while it runs; see `claimed`.

    Raises:
      ValueError: another process runs the folder.
      OSError: the folder cannot be written.
    """
    with _mark(folder, patient=False), _lend_mark(folder):
        yield


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Marks the folder of a run as `running` does, or takes over this process's own mark on it.

    If the owner is on another host, this waits until the owner touches its mark, which raises the error below, or until
    the owner must be dead.

    Raises:
      ValueError: another process, or another run in this process, runs the folder.
      OSError: the folder cannot be written.
    """
    name = os.path.realpath(folder)
    if name not in _lent:
        with _mark(folder, patient=True):
            yield
        return
    _lent.discard(name)
    try:
        yield
    finally:
        _lent.add(name)


def running_elsewhere(folder: Path) -> str | None:
    """Returns an error message if another process of this host, or another run in this process, runs the folder.

    Returns None otherwise.
    """
    now = owner(folder / RUNNING)
    if now is None or now.host != socket.gethostname() or now.pid == os.getppid():
        return None
    return None if os.path.realpath(folder) in _lent else _in_use_message(folder, str(now))


def _in_use_message(folder: Path, name: str) -> str:
    return f"{folder} is being run by {name}: wait until that ends, or stop it first"


@contextlib.contextmanager
def _lend_mark(folder: Path) -> Iterator[None]:
    name = os.path.realpath(folder)
    _lent.add(name)
    try:
        yield
    finally:
        _lent.discard(name)


@contextlib.contextmanager
def _mark(folder: Path, patient: bool) -> Iterator[None]:
    mark = folder / RUNNING
    if owner(mark) == Owner(os.getppid(), socket.gethostname()):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _clear(mark, patient)

    def refuse(name: str) -> None:
        raise ValueError(_in_use_message(folder, name))

    with lock(mark, refuse):
        yield


def _clear(mark: Path, patient: bool) -> None:
    """Removes the mark of a dead owner at once; `lock` would wait a minute if that owner was on another host.

    Args:
      mark: the lock file.
      patient: whether to wait, if the owner is on another host, until it touches its mark or must be dead.
    """
    first = None
    while True:
        try:
            now, text = mark.stat().st_mtime, mark.read_text()
        except (FileNotFoundError, NotADirectoryError):
            return
        found = _owner(text, time.time() - now)
        if found is None:
            _remove(mark, text)
            return
        first = first or (now, text)
        if not patient or found.host == socket.gethostname() or first != (now, text):
            return
        time.sleep(min(0.2, DEAD_AFTER / 10))

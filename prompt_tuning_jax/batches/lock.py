"""One process at a time: a lock that is a file, so that it holds between hosts that share a disk."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEAD_AFTER = 60.0  # seconds without a sign of life
RUNNING = "running"  # the lock in a folder that a process runs

_lent: set[str] = set()  # folders that this process has marked for the runs which it starts in itself


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
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}))
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
            gone = owner["host"] == socket.gethostname() and not _lives(owner["pid"], owner.get("started"))
            name = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, KeyError, TypeError):  # it is just being written, or was cut short
            gone, name = False, "another process"
        if gone or time.monotonic() - since > dead_after:
            _remove(path, text)
            return
        if not told:
            waiting(name)
            told = True
        time.sleep(min(0.2, dead_after / 10))


def _lives(pid: int, started: Any = None) -> bool:
    """Returns whether the process lives: the same one, if its start is known, and not one that was given its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _started(pid)
    return started is None or now is None or started == now


def _started(pid: int) -> int | None:
    """Returns when a process of this host was started, in ticks since the host was; None if the system does not say."""
    try:
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _remove(path: Path, text: str) -> None:
    """Removes a dead owner's lock, and no other that was taken in the meantime."""
    moved = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, moved)
        if moved.read_text() != text:
            with contextlib.suppress(OSError):
                os.link(moved, path)
        moved.unlink()


class Owner(NamedTuple):
    """The process that holds a lock."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def owner(mark: Path) -> Owner | None:
    """Who holds a lock and lives, on this host or another that shares the disk; None if nobody."""
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
    except (ValueError, TypeError, AttributeError):  # it is just being written, or was cut short
        found = Owner(0, "an unknown host")
    if found.host == socket.gethostname():
        if not _lives(found.pid, started):
            return None
        if started is not None and _started(found.pid) == started:
            return found  # it may have been stopped for long
    # Also if its pid lives: after a restart of the host it is another's.
    return found if age <= DEAD_AFTER else None


@contextlib.contextmanager
def running(folder: Path) -> Iterator[None]:
    """Marks a folder, a trial's or a sweep's, as run by this process, as long as the context is open and it lives.

    A process whose parent has marked the folder runs it for its parent. A run in this process may take the mark over
    for its time: see `claimed`.

    Raises:
      ValueError: another process runs it.
      OSError: the folder cannot be written.
    """
    with _marked(folder, patient=False), _lending(folder):
        yield


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Marks the folder of a run as `running` does, or takes over the mark that this process has put on it.

    An owner on another host is waited for until it has given a sign of life, and is refused then, or must be dead.

    Raises:
      ValueError: another process runs it, or another run in this one.
      OSError: the folder cannot be written.
    """
    name = os.path.realpath(folder)
    if name not in _lent:
        with _marked(folder, patient=True):
            yield
        return
    _lent.discard(name)
    try:
        yield
    finally:
        _lent.add(name)


def running_elsewhere(folder: Path) -> str | None:
    """Returns that another process of this host runs the folder, or another run in this one; None if neither does."""
    now = owner(folder / RUNNING)
    if now is None or now.host != socket.gethostname() or now.pid == os.getppid():
        return None
    return None if os.path.realpath(folder) in _lent else _being_run(folder, str(now))


def _being_run(folder: Path, name: str) -> str:
    return f"{folder} is being run by {name}: wait until that ends, or stop it first"


@contextlib.contextmanager
def _lending(folder: Path) -> Iterator[None]:
    name = os.path.realpath(folder)
    _lent.add(name)
    try:
        yield
    finally:
        _lent.discard(name)


@contextlib.contextmanager
def _marked(folder: Path, patient: bool) -> Iterator[None]:
    mark = folder / RUNNING
    if owner(mark) == Owner(os.getppid(), socket.gethostname()):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    _clear(mark, patient)

    def refuse(name: str) -> None:
        raise ValueError(_being_run(folder, name))

    with lock(mark, refuse):
        yield


def _clear(mark: Path, patient: bool) -> None:
    """Removes the mark of an owner that is dead: `lock` would wait a minute for one of another host.

    Args:
      patient: if the owner is on another host, wait until it has touched its mark or must be dead.
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

"""Refuses pipes, devices and sockets where a regular file is expected, because reading them may never end."""

import errno
import os
from pathlib import Path


def is_irregular(path: str | os.PathLike) -> bool:
    """Returns whether there is something at `path`, or where it links to, that is neither a file nor a folder."""
    path = Path(path)
    return path.exists() and not path.is_file() and not path.is_dir()


def regular(path: str | os.PathLike) -> Path:
    """Returns `path`, for whoever opens it next.

    Raises:
      OSError: it is a pipe, a device or a socket.

    >>> regular("/dev/zero").read_bytes()
    Traceback (most recent call last):
    OSError: [Errno 22] no regular file: '/dev/zero'
    """
    if is_irregular(path):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return Path(path)

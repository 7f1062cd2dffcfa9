"""The kernel's lock on a file, dropped when the process that holds it ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import BinaryIO


class NoLocksError(OSError):
    """The file system has no locks."""


def open_to_lock(path: Path) -> BinaryIO:
    """Open a file for `lock_stream`, unbuffered, for reading and writing; it is made where it is missing."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)


def lock_stream(stream: BinaryIO, path: Path, *, wait: bool = False) -> None:
    """Lock the file that was opened at ``path`` until the stream is closed. wait: until its holder gives it up.

    Raises BlockingIOError where another process holds it, FileNotFoundError where the holder has removed or renamed
    the file since it was opened, so that the lock keeps nobody out, NoLocksError.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise NoLocksError(error.errno, f"flock: {error.strerror}", os.fspath(path)) from error
    if not path.exists() or not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
        raise FileNotFoundError(path)

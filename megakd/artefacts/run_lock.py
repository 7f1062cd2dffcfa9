"""One run at a time on one output."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from megakd.artefacts.durable_files import explain_no_space, make_parent
from megakd.errors import UsageError


class HeldError(UsageError):
    """Another run holds the lock, or has just given it up."""


class RunLock:
    """Holds ``path`` while a run writes its outputs, whose folder is made where it is missing. A context manager.

    The kernel drops the lock when its process dies, however it dies, and the next run takes over the file it left.

    Raises HeldError where another run holds it, with that run's host, process and start; UsageError where the file
    system has no locks, without which two runs would spoil each other's files; NoSpaceError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None

    def __enter__(self) -> RunLock:
        make_parent(self._path)
        stream = open(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = stream.read().decode(errors="replace").strip() or "it has just started"
            stream.close()
            raise HeldError(
                f"{self._path}: another run is writing this output: {told}; wait for it or end it"
            ) from None
        except OSError as error:
            stream.close()
            raise UsageError(
                f"{self._path}: this file system has no locks (flock: {error.strerror}), which keep two runs apart; "
                "write to another one, or mount it with locks"
            ) from error
        if not self._path.exists() or not os.path.samestat(os.fstat(stream.fileno()), self._path.stat()):
            stream.close()
            raise HeldError(f"{self._path}: another run on this output has just ended; run again to see what it made")
        self._stream = stream
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        try:
            with explain_no_space(self._path):
                stream.truncate(0)
                stream.write(json.dumps(holder).encode() + b"\n")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

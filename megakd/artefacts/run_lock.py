"""Lock of a run: one run at a time writes an output."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from megakd.artefacts.durable_files import explain_no_space, make_parent
from megakd.artefacts.file_lock import NoLocksError, lock_stream, open_to_lock
from megakd.errors import UsageError


class HeldError(UsageError):
    """Another run holds the lock, or has just given it up."""


class RunLock:
    """Holds the lock file ``path`` while a run writes its outputs; its folder is made where it is missing. A context
    manager.

    The kernel drops the lock when the process dies, however it dies; the next run takes over the file that is left.

    Raises HeldError where another run holds it, with that run's host, process and start; UsageError where the file
    system has no locks, without which two runs would spoil each other's files; NoSpaceError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None

    def __enter__(self) -> RunLock:
        make_parent(self._path)
        stream = open_to_lock(self._path)
        try:
            lock_stream(stream, self._path)
        except BlockingIOError:
            holder = stream.read().decode(errors="replace").strip() or "it has just started"
            stream.close()
            raise HeldError(
                f"{self._path}: another run is writing this output: {holder}; wait for it or end it"
            ) from None
        except FileNotFoundError:
            stream.close()
            raise HeldError(
                f"{self._path}: another run on this output has just ended; run again to see what it made"
            ) from None
        except NoLocksError as error:
            stream.close()
            raise UsageError(
                f"{self._path}: this file system has no locks ({error.strerror}), which keep two runs apart; "
                "write to another one, or mount it with locks"
            ) from error
        self._stream = stream
        this_run = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        }
        try:
            with explain_no_space(self._path):
                stream.truncate(0)
                stream.write(json.dumps(this_run).encode() + b"\n")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

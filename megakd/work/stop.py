"""Stopping a run when asked to, and work beside it that stops with it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megakd.artefacts.durable_files import hash_file
from megakd.errors import ExitStatus, StoppedBySignal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM or Ctrl-C while inside the ``with``; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, it is never set.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def check(self) -> None:
        """Raise StoppedBySignal once a signal came."""
        if self._signal is not None:
            raise StoppedBySignal(f"stopped by {signal.Signals(self._signal).name}")

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(ExitStatus.STOPPED)
        self._signal = number


class BackgroundHashes:
    """XXH3-128 of files, computed in a thread while other processes do the work."""

    def __init__(self, paths: list[Path], *, stopped: Callable[[], bool]) -> None:
        self._hashes: list[str] = []
        self._error: OSError | None = None
        self._stopped = stopped
        self._thread = threading.Thread(target=self._run, args=(paths,), daemon=True)
        self._thread.start()

    def wait(self) -> list[str]:
        """The hashes, in the order of the paths. Raises StoppedBySignal, or what reading a file raised."""
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._error is not None:
            raise self._error
        if self._stopped():
            raise StoppedBySignal("stopped by a signal")
        return self._hashes

    def _run(self, paths: list[Path]) -> None:
        def check(_: int) -> None:
            if self._stopped():
                raise StoppedBySignal

        try:
            for path in paths:
                self._hashes.append(hash_file(path, progress=check).xxh3_128)
        except OSError as error:
            self._error = error
        except StoppedBySignal:
            return

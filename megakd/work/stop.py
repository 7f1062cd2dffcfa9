"""Stopping a run when asked to."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

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

"""Request to stop: SIGTERM or Ctrl-C lets a run finish what it is at, and a later one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from megakd.errors import StoppedBySignal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_REQUEST_SECONDS = 2.0


class StopFlag:
    """Set by SIGTERM or SIGINT, from `install` or the start of a ``with`` on; leaving the ``with`` restores the
    handlers that were there before.

    A launcher passes on what it gets, and a scheduler may signal launcher and ranks alike, so signals within two
    seconds of the first one are the same request. A later one ends the process at once, by that signal.

    Outside the main thread, where Python allows no handlers, the flag is never set.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    def is_set(self) -> bool:
        """Return whether a signal came."""
        return self._signal is not None

    def check(self) -> None:
        """Raise StoppedBySignal once a signal came."""
        if self._signal is not None:
            raise StoppedBySignal(f"stopped by {signal.Signals(self._signal).name}")

    def install(self) -> StopFlag:
        """Handle the signals from now on; for a run that keeps its handlers until the process ends."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __enter__(self) -> StopFlag:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

"""SIGTERM and SIGINT: the first one asks the run to finish its step, save and exit; a second one ends it at once.

So does the end of the time that a run was given.

A launcher passes on what it gets, and a scheduler may signal launcher and ranks alike: what comes within two seconds of
the first signal is the same request.
"""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

_SAME_REQUEST_SECONDS = 2.0


class StopRequest:
    """Whether any rank was asked to stop. Install it once, in the main thread.

    minutes: from now on, after which a run is to stop by itself.
    """

    def __init__(self, device: torch.device, *, minutes: float | None = None) -> None:
        self._device = device
        self._ends_at = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._asked_at: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> bool:
        """The same answer on every rank. All ranks call it, once a step."""
        asked = self._asked_at is not None or time.monotonic() >= self._ends_at
        flag = torch.tensor(int(asked), dtype=torch.int32, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

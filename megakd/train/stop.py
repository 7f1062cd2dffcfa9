"""Stop of a training run: asked for by a signal to any rank, or due at the end of its time, and agreed by all ranks."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist

from megakd.work.stop import StopFlag


class StopRequest:
    """Request to finish the step, save and exit. Make it once, in the main thread: it handles SIGTERM and SIGINT.

    minutes: time from now on after which the run stops by itself; None: never.
    """

    def __init__(self, device: torch.device, *, minutes: float | None = None) -> None:
        self._device = device
        self._ends_at = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._flag = StopFlag().install()

    def agreed(self) -> bool:
        """Return whether any rank is to stop; the answer is the same on every rank. All ranks call it, once a step."""
        asked = self._flag.is_set() or time.monotonic() >= self._ends_at
        flag = torch.tensor(int(asked), dtype=torch.int32, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

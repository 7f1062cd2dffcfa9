"""SIGTERM and SIGINT: the first one asks the run to finish its step, save and exit; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Whether any rank was asked to stop. Install it once, in the main thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> bool:
        """The same answer on every rank. All ranks call it, once a step."""
        flag = torch.tensor(int(self._asked), dtype=torch.int32, device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

"""TAID's interpolation weight, which grows with training and is part of its state (arXiv 2501.16937, algorithm 1)."""

from __future__ import annotations

import math
from typing import Any

_EPSILON = 1e-15


class Taid:
    """t, the teacher's weight in the target of forward KL: from ``t_start`` to ``t_end``, never falling.

    After every update, with L the mean of the KD loss over the global batch:

        relative = (L_before - L) / (L_before + epsilon)
        momentum = beta · momentum + (1 - beta) · relative
        t        = min(t_end, max(t_line, t + alpha · sigmoid(momentum) · (1 - t)))
        t_line   = t_start + (t_end - t_start) · step / train_iters

    The first update only remembers L: there is nothing to compare it with. All ranks see the same L, so the same t.
    """

    def __init__(self, *, t_start: float, t_end: float, alpha: float, beta: float, train_iters: int) -> None:
        self._t_start, self._t_end, self._train_iters = t_start, t_end, train_iters
        self._alpha, self._beta = alpha, beta
        self.t = t_start
        self._momentum = 0.0
        self._loss: float | None = None

    def advance(self, step: int, loss: float) -> None:
        """Take note of ``loss``, what the update of ``step`` was made from."""
        before, self._loss = self._loss, loss
        if before is None:
            return
        relative = (before - loss) / (before + _EPSILON)
        self._momentum = self._beta * self._momentum + (1 - self._beta) * relative
        line = self._t_start + (self._t_end - self._t_start) * step / self._train_iters
        gain = self._alpha * _sigmoid(self._momentum) * (1 - self.t)
        self.t = min(self._t_end, max(line, self.t + gain))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"t": self.t, "momentum": self._momentum, "loss": self._loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self._momentum, self._loss = state["t"], state["momentum"], state["loss"]


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))  # no overflow however fast the loss has risen

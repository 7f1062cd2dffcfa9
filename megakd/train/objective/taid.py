"""TAID's interpolation weight, which grows during training (arXiv 2501.16937, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

_EPSILON = 1e-15


@dataclass(frozen=True)
class Taid:
    """TAID's rule and its progress: t, the teacher's weight in the target of forward KL, which never falls.

    After every update, with L the mean of the KD loss over the global batch:

        relative = (L_before - L) / (L_before + epsilon)
        momentum = beta · momentum + (1 - beta) · relative
        t        = min(t_end, max(t_line, t + alpha · sigmoid(momentum) · (1 - t)))
        t_line   = t_start + (t_end - t_start) · step / train_iters

    The first update only remembers L: there is nothing to compare it with. All ranks see the same L, so the same t.

    progress: t, momentum and L after the updates so far; None before the first.
    """

    t_start: float
    t_end: float
    alpha: float
    beta: float
    train_iters: int
    progress: TaidProgress | None = None

    @property
    def t(self) -> float:
        """The teacher's weight in the target of the next step."""
        return self.t_start if self.progress is None else self.progress.t

    def advance(self, step: int, loss: float) -> Taid:
        """Return the rule after the update of ``step``, which was made from ``loss``."""
        before = self.progress or TaidProgress(self.t_start)
        if before.loss is None:
            return replace(self, progress=replace(before, loss=loss))
        relative = (before.loss - loss) / (before.loss + _EPSILON)
        momentum = self.beta * before.momentum + (1 - self.beta) * relative
        line = self.t_start + (self.t_end - self.t_start) * step / self.train_iters
        gain = self.alpha * _sigmoid(momentum) * (1 - before.t)
        return replace(self, progress=TaidProgress(min(self.t_end, max(line, before.t + gain)), momentum, loss))

    def state(self) -> dict[str, Any]:
        """Return the progress as plain numbers."""
        return asdict(self.progress or TaidProgress(self.t_start))

    def restored(self, state: Mapping[str, Any]) -> Taid:
        """Return the rule where it stood when `state` was called."""
        return replace(self, progress=TaidProgress(**state))


@dataclass(frozen=True)
class TaidProgress:
    """TAID's numbers after an update: t, the momentum of the loss's relative change, and the loss itself."""

    t: float
    momentum: float = 0.0
    loss: float | None = None


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * x))  # no overflow however fast the loss has risen

"""Alpha and the temperature of distillation over a run: pure functions of the step. No torch.

The shapes are those of Pre-training Distillation (arXiv 2410.16215, Table 5); their formulas are in
``docs/numerics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

Shape = Literal["constant", "linear_up", "linear_down", "cosine", "periodic", "wsd", "wsd_beta"]
DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]

SHAPES: Mapping[str, str] = MappingProxyType(
    {
        "constant": "the value itself at every step",
        "linear_up": "a straight line from its -min up to the value at --kd-schedule-iters",
        "linear_down": "a straight line from the value down to its -min at --kd-schedule-iters",
        "cosine": "half a cosine from the value down to its -min at --kd-schedule-iters",
        "periodic": "a cosine wave: the value, its -min half a --kd-schedule-period later, the value again",
        "wsd": "the phases of a WSD learning rate, whatever style the learning rate has: up to the value over "
        "--lr-warmup-iters, constant until --lr-wsd-decay-iters before the end, then down as --lr-wsd-decay-style says",
        "wsd_beta": "the mirror image of wsd: 1 - alpha has those phases, KD weighs most at both ends",
    }
)

_DECAYS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
        "exponential": lambda x: 2 * 0.5**x - 1,
        "minus_sqrt": lambda x: 1 - math.sqrt(x),
    }
)


@dataclass(frozen=True)
class Schedule:
    """A value between ``low`` and ``high`` at every step; the first step is 1.

    end: the step at which linear, cosine and wsd shapes end; later steps keep the last value. period: steps of one
    wave. warmup, decay, decay_style: phases of wsd, in steps before the peak and before ``end``. Fields that a shape
    does not use keep their defaults, so that two schedules are equal if they give equal values.
    """

    shape: Shape
    high: float
    low: float = 0.0
    end: int = 0
    period: int = 0
    warmup: int = 0
    decay: int = 0
    decay_style: DecayShape = "linear"

    def at(self, step: int) -> float:
        """Return the value for the update of ``step``."""
        level = self._level(step)
        if level in (0.0, 1.0):  # exact ends: a teacher is left out where alpha is exactly 0
            return self.high if level else self.low
        return self.low + (self.high - self.low) * level

    def _level(self, step: int) -> float:
        """Return the place between low (0) and high (1)."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "periodic":
            return 0.5 * (1 + math.cos(2 * math.pi * ((step - 1) % self.period) / self.period))
        if self.shape in ("wsd", "wsd_beta"):
            level = self._phase(step - 1)
            return level if self.shape == "wsd" else 1 - level
        x = min(step / self.end, 1.0)
        if self.shape == "linear_up":
            return x
        return _DECAYS["linear" if self.shape == "linear_down" else "cosine"](x)

    def _phase(self, finished: int) -> float:
        """Return the share of its range that a WSD learning rate has after ``finished`` updates."""
        if finished < self.warmup:
            return finished / self.warmup
        into = finished - (self.end - self.decay)
        return 1.0 if into <= 0 else _DECAYS[self.decay_style](min(into / self.decay, 1.0))


@dataclass(frozen=True)
class Phases:
    """Phases of a WSD learning rate: its last step, the steps of its warm-up and of its decay, the decay's shape."""

    end: int
    warmup: int
    decay: int
    decay_style: DecayShape


def make_schedule(shape: Shape, high: float, low: float, *, end: int, period: int, phases: Phases) -> Schedule:
    """Build the schedule of ``shape`` with only the fields that it uses."""
    if shape == "constant":
        return Schedule(shape, high)
    if shape == "periodic":
        return Schedule(shape, high, low, period=period)
    if shape in ("wsd", "wsd_beta"):
        return Schedule(
            shape,
            high,
            low,
            end=phases.end,
            warmup=phases.warmup,
            decay=phases.decay,
            decay_style=phases.decay_style,
        )
    return Schedule(shape, high, low, end=end)


@dataclass(frozen=True)
class KDSchedule:
    """Alpha, temperature and LM weight of a run at each step. lm_weight: None stands for 1 - alpha."""

    alpha: Schedule
    temperature: Schedule
    lm_weight: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint's record. Nothing needs restoring: the step decides every value."""
        return asdict(self)

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Return the differences from the schedule of a checkpoint, a phrase each; none if it does not record one."""
        now = self.state_dict()
        differing = [key for key in now if key in state and state[key] != now[key]]
        return [f"{key}: {_tell(state[key])} there, {_tell(now[key])} here" for key in differing]


def _tell(value: Any) -> str:
    if not isinstance(value, dict):
        return "1 - alpha" if value is None else str(value)
    used = [
        f"{key} {setting}"
        for key, setting in value.items()
        if key not in ("shape", "high") and setting not in (0, "linear")
    ]
    return " ".join([str(value["shape"]), str(value["high"]), *used])


def schedule_help() -> list[str]:
    """Return the lines about schedules that ``--help`` prints, one or more for each shape."""
    lines = []
    for shape, meaning in SHAPES.items():
        words, line = meaning.split(), f"  {shape:<13}"
        for word in words:
            if len(line) + len(word) > 118:
                lines.append(line.rstrip())
                line = " " * 15
            line += word + " "
        lines.append(line.rstrip())
    return lines

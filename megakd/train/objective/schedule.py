"""Alpha and the temperature of distillation over a run: pure functions of the step. No torch.

The shapes are those of Pre-training Distillation (arXiv 2410.16215, Table 5) and stand in ``docs/numerics.md``.
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
        "linear_up": "in a straight line from its -min up to the value at --kd-schedule-iters",
        "linear_down": "in a straight line from the value down to its -min at --kd-schedule-iters",
        "cosine": "from the value down to its -min by half a cosine",
        "periodic": "a cosine wave: the value, its -min half a --kd-schedule-period later, the value again",
        "wsd": "with the phases of a WSD learning rate, also beside another one: up to the value over "
        "--lr-warmup-iters, there until --lr-wsd-decay-iters before the end, then down as --lr-wsd-decay-style says",
        "wsd_beta": "the mirror image: 1 - alpha has those phases, KD weighs most at both ends",
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
    """A value between ``low`` and ``high`` at every step, the first of which is 1.

    end: the step at which linear, cosine and wsd shapes end; from there on their last value stays. period: steps of one
    wave. warmup, decay, decay_style: phases of wsd, in steps before the peak and before ``end``. What a shape does not
    use keeps its default, so that two schedules are equal if they give equal values.
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
        """The value for the update of ``step``."""
        level = self._level(step)
        if level in (0.0, 1.0):  # the ends to the bit: a teacher is left out where alpha is exactly 0
            return self.high if level else self.low
        return self.low + (self.high - self.low) * level

    def _level(self, step: int) -> float:
        """0 for low, 1 for high."""
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
        """The share of its range that a WSD learning rate has after so many updates."""
        if finished < self.warmup:
            return finished / self.warmup
        into = finished - (self.end - self.decay)
        return 1.0 if into <= 0 else _DECAYS[self.decay_style](min(into / self.decay, 1.0))


@dataclass(frozen=True)
class Phases:
    """Of a WSD learning rate: its last step, the steps of its warm-up and of its decay, the shape of the decay."""

    end: int
    warmup: int
    decay: int
    decay_style: DecayShape


def make_schedule(shape: Shape, high: float, low: float, *, end: int, period: int, phases: Phases) -> Schedule:
    """The schedule of ``shape`` with what it needs, and no more."""
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
    """What the weights of a run are at each step. lm_weight: a weight of the LM loss of its own; None is 1 - alpha."""

    alpha: Schedule
    temperature: Schedule
    lm_weight: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint's record: plain data. Nothing is carried on: the step says it all."""
        return asdict(self)

    def changes(self, state: dict[str, Any]) -> list[str]:
        """What differs from the schedule of a checkpoint, a phrase each; none for checkpoints older than schedules."""
        now = self.state_dict()
        differing = [key for key in now if key in state and state[key] != now[key]]
        return [f"{key}: {_tell(state[key])} there, {_tell(now[key])} here" for key in differing]


def _tell(value: Any) -> str:
    if not isinstance(value, dict):
        return "1 - alpha" if value is None else str(value)
    used = [
        f"{key} {told}" for key, told in value.items() if key not in ("shape", "high") and told not in (0, "linear")
    ]
    return " ".join([str(value["shape"]), str(value["high"]), *used])


def schedule_help() -> list[str]:
    """A line or two for each shape, as ``--help`` prints them."""
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

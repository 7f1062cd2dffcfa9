"""Number of samples of each step: one number, or a ramp up to it, as with Megatron's ``--rampup-batch-size``."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

from megakd.errors import UsageError

_MOST_STEPS = 10_000_000


@dataclass(frozen=True)
class Ramp:
    """Ramp of the batch size: from ``start`` samples up in steps of ``increment``, over ``samples`` samples in all."""

    start: int
    increment: int
    samples: int


@dataclass(frozen=True)
class BatchSizes:
    """Number of samples of a step, a function of those consumed before it, so that a continued run has the same sizes.

    A ramp has ``(global_batch_size - start) / increment`` levels below the last, which share its ``samples`` evenly; a
    step that begins inside a level has its size. After ``samples`` every step has ``global_batch_size``.

    Raises UsageError for a ramp that does not end at ``global_batch_size``.
    """

    global_batch_size: int
    ramp: Ramp | None = None

    def __post_init__(self) -> None:
        ramp = self.ramp
        if ramp is None:
            return
        told = f"--rampup-batch-size {ramp.start} {ramp.increment} {ramp.samples}"
        if min(ramp.start, ramp.increment, ramp.samples) < 1:
            raise UsageError(f"{told}: expected START INCREMENT SAMPLES, each at least 1")
        if not ramp.start < self.global_batch_size or (self.global_batch_size - ramp.start) % ramp.increment:
            raise UsageError(
                f"{told} does not come to --global-batch-size {self.global_batch_size}: expected a smaller START, and "
                "a multiple of INCREMENT between them"
            )
        if ramp.samples // ramp.start > _MOST_STEPS:
            raise UsageError(f"{told}: more than {_MOST_STEPS} steps; expected a shorter ramp or a larger START")

    @property
    def levels(self) -> list[int]:
        """Every size that occurs, ascending."""
        if self.ramp is None:
            return [self.global_batch_size]
        return [*range(self.ramp.start, self.global_batch_size, self.ramp.increment), self.global_batch_size]

    def at(self, consumed_samples: int) -> int:
        """Samples of the step that begins after ``consumed_samples``."""
        ramp = self.ramp
        if ramp is None or consumed_samples > ramp.samples:
            return self.global_batch_size
        num_levels = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + int(consumed_samples / (ramp.samples / num_levels)) * ramp.increment

    def consumed_after(self, steps: int) -> int:
        """Number of samples of the first ``steps`` steps."""
        in_ramp = self._ramp_starts
        if steps < len(in_ramp):
            return in_ramp[steps]
        return in_ramp[-1] + (steps - len(in_ramp) + 1) * self.global_batch_size

    def steps_of(self, samples: float) -> int:
        """Number of whole steps among the first ``samples`` samples."""
        in_ramp = self._ramp_starts
        if samples < in_ramp[-1]:
            return bisect_right(in_ramp, samples) - 1
        return len(in_ramp) - 1 + int((samples - in_ramp[-1]) // self.global_batch_size)

    def train_iters(self, train_samples: int) -> int:
        """Number of steps of a run of ``train_samples`` samples, counted as Megatron counts them.

        In the ramp a step begins as long as samples are left; after it a last step that is not full is left out.
        """
        in_ramp = self._ramp_starts
        if train_samples < in_ramp[-1]:
            return bisect_right(in_ramp, train_samples)
        return self.steps_of(train_samples)

    @cached_property
    def _ramp_starts(self) -> list[int]:
        """Samples consumed before each step of the ramp, and before the first step after it."""
        starts, ramp = [0], self.ramp
        while ramp is not None and starts[-1] <= ramp.samples:
            starts.append(starts[-1] + self.at(starts[-1]))
        return starts

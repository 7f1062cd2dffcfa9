"""Ends of the learning rate's phases: in steps, or in samples if the run's length is given in samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megakd.errors import UsageError
from megakd.train.objective.schedule import DecayShape, Phases

if TYPE_CHECKING:
    from megakd.train.config import OptimConfig, TrainingConfig


@dataclass(frozen=True)
class Lengths:
    """Phases of the learning rate, in ``unit``: the end of the decay, the warm-up, and WSD's final decay."""

    unit: Literal["iters", "samples"]
    end: int
    warmup: float
    wsd_decay: int

    def phases(self, steps: Callable[[float], int], decay_style: DecayShape) -> Phases:
        """Return the phases of WSD in steps. steps: converts a number of the unit into whole steps."""
        end = max(1, steps(self.end))
        decay = max(1, end - steps(self.end - self.wsd_decay))
        return Phases(end=end, warmup=steps(self.warmup), decay=decay, decay_style=decay_style)


def lr_lengths(optim: OptimConfig, train_iters: int, train_samples: int | None = None) -> Lengths:
    """Return the phases that the options give a run of ``train_iters`` steps, or of ``train_samples`` samples.

    Raises UsageError for lengths in the other unit, and for two that say one thing.
    """
    unit: Literal["iters", "samples"] = "iters" if train_samples is None else "samples"
    if unit == "iters":
        other, stray = "samples", (optim.lr_warmup_samples, optim.lr_decay_samples, optim.lr_wsd_decay_samples)
        total, warmup = train_iters, float(optim.lr_warmup_iters)
        end, wsd_decay = optim.lr_decay_iters, optim.lr_wsd_decay_iters
    else:
        other, stray = "iters", (optim.lr_warmup_iters, optim.lr_decay_iters, optim.lr_wsd_decay_iters)
        total, warmup = train_samples or 0, float(optim.lr_warmup_samples)
        end, wsd_decay = optim.lr_decay_samples, optim.lr_wsd_decay_samples
    for name, value in zip(("lr-warmup", "lr-decay", "lr-wsd-decay"), stray):
        if value:
            raise UsageError(
                f"--{name}-{other} {value} in a run of --train-{unit}: the learning rate counts "
                f"{'steps' if unit == 'iters' else 'samples'} there; say --{name}-{unit}, or --train-{other}"
            )
    end = end or total
    if optim.lr_warmup_fraction is not None:
        if warmup:
            raise UsageError(f"--lr-warmup-fraction and --lr-warmup-{unit} {warmup:g} say one thing twice: drop one")
        warmup = optim.lr_warmup_fraction * end
    return Lengths(unit, end, warmup, wsd_decay or max(1, end // 10))


def check_lengths(optim: OptimConfig, lengths: Lengths, *, with_phases: bool = False) -> None:
    """Refuse phases that do not fit into the run. with_phases: WSD's are used, whatever the learning rate's style."""
    unit, warmup, end = lengths.unit, lengths.warmup, lengths.end
    told = f"--lr-warmup-{unit} {warmup:g}"
    if warmup >= end:
        words = "steps" if unit == "iters" else "samples"
        raise UsageError(f"{told} leaves nothing of the {end} decay {words}")
    if optim.lr_decay_style == "inverse-square-root" and warmup < 1:
        raise UsageError("--lr-decay-style inverse-square-root falls from the end of a warm-up: add --lr-warmup-iters")
    if (optim.lr_decay_style == "WSD" or with_phases) and warmup + lengths.wsd_decay > end:
        raise UsageError(f"{told} + --lr-wsd-decay-{unit} {lengths.wsd_decay} exceed --lr-decay-{unit} {end}")


def check_told_once(training: TrainingConfig) -> None:
    """Refuse a length in steps that differs from the one in samples. A run's recorded configuration has both."""
    if training.train_samples is None:
        return
    comes_to = training.batch_sizes.train_iters(training.train_samples)
    if training.train_iters not in (type(training)().train_iters, comes_to):
        raise UsageError(
            f"--train-iters {training.train_iters} and --train-samples {training.train_samples} ({comes_to} steps) say "
            "one thing twice: drop one"
        )

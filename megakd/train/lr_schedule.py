"""The learning rate over a run, in steps: warm-up, then constant, linear, cosine or WSD (warm-up, stable, decay)."""

from __future__ import annotations

from typing import Any

import megakd.parallel  # noqa: F401  (before any megatron import)
from megakd.train.config import OptimConfig
from megakd.train.lengths import Lengths, lr_lengths

# isort: split
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_lr_schedule(
    optim: OptimConfig, optimizer: Any, *, train_iters: int, lengths: Lengths | None = None
) -> OptimizerParamScheduler:
    """Build megatron's scheduler, which counts finished updates as Megatron-LM's training loop does.

    `set_rate` moves it.

    lengths: its phases, in the unit that it counts; None: those of a run of ``train_iters`` steps.

    WSD holds the peak until ``lr_wsd_decay_iters`` before the end, then decays linearly, by half a cosine,
    exponentially (``2 * 0.5^x - 1``) or as ``1 - sqrt(x)``. Weight decay is constant.
    """
    lengths = lengths or lr_lengths(optim, train_iters)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr_warmup_init,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=lengths.warmup,  # a share of the steps need not be whole
        lr_decay_steps=lengths.end,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=lengths.wsd_decay if optim.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=optim.lr_wsd_decay_style if optim.lr_decay_style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    return schedule


def set_rate(schedule: OptimizerParamScheduler, finished: int) -> float:
    """Set the optimizer's learning rate for the next update, and return it.

    finished: steps of the updates before it, or samples if the schedule counts samples. The rate at that number is
    Megatron's convention (docs/decisions/0011): without a warm-up the first update has the peak rate, and the last
    update is one step short of the end of the decay.
    """
    schedule.num_steps = 0
    schedule.step(finished)
    return float(schedule.get_lr({}))

"""The learning rate over a run, in steps: warm-up, then constant, linear, cosine or WSD (warm-up, stable, decay)."""

from __future__ import annotations

from typing import Any

import megakd.parallel  # noqa: F401  (before any megatron import)
from megakd.train.config import OptimConfig

# isort: split
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_lr_schedule(optim: OptimConfig, optimizer: Any, *, train_iters: int) -> OptimizerParamScheduler:
    """megatron's scheduler, counting finished steps as Megatron-LM's training loop does: ``set_rate`` is what moves it.

    WSD holds the peak until ``lr_wsd_decay_iters`` before the end, then decays linearly, by half a cosine,
    exponentially (``2 * 0.5^x - 1``) or as ``1 - sqrt(x)``. Weight decay is constant.
    """
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=optim.decay_iters(train_iters),
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        wsd_decay_steps=optim.wsd_decay_iters(train_iters) if optim.lr_decay_style == "WSD" else None,
        lr_wsd_decay_style=optim.lr_wsd_decay_style if optim.lr_decay_style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )
    return schedule


def set_rate(schedule: OptimizerParamScheduler, step: int) -> float:
    """Give the optimizer the learning rate for the update of ``step``, the first of which is 1, and return it.

    It is the schedule's value after the ``step - 1`` updates before, Megatron's convention (decision 0011): the first
    update without a warm-up has the peak rate, the last one is a step short of the end of the decay.
    """
    schedule.num_steps = 0
    schedule.step(step - 1)
    return float(schedule.get_lr({}))

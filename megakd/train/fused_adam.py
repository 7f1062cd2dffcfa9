"""AdamW with the state layout of NVIDIA's FusedAdam, for machines without Transformer Engine and apex.

megatron-core's distributed optimizer stores and reshards that layout only: ``step`` in the parameter group, and
``exp_avg`` and ``exp_avg_sq`` a parameter (distrib_optimizer.py:642, 940 fail on torch's own AdamW).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import megakd.parallel  # noqa: F401  (before any megatron import)

# isort: split
import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), bias-corrected.

    Parameters and state have the dtype that megatron passes: fp32 main parameters under bf16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("this AdamW only decays weights apart from the gradient")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. ``closure`` is not used."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            if "exp_avg" not in self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        first = [self.state[param]["exp_avg"] for param in params]
        second = [self.state[param]["exp_avg_sq"] for param in params]
        update = _UPDATES.get(params[0].device.type, _update_in_passes)
        update(params, grads, first, second, group)


def _update_in_passes(
    params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], group: dict[str, Any]
) -> None:
    """Update parameters and state in place, one operation at a time.

    first, second: the moments. group: ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``step``, which counts from 1.
    """
    beta1, beta2 = group["betas"]
    torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
    torch._foreach_lerp_(first, grads, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1.0 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, math.sqrt(1.0 - beta2 ** group["step"]))
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1.0 - beta1 ** group["step"]))


def _update_in_one_pass(
    params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], group: dict[str, Any]
) -> None:
    """Update by torch's fused kernel, which reads and writes each number once and makes no copy of a moment.

    Arguments and result are those of `_update_in_passes`, up to rounding.
    """
    beta1, beta2 = group["betas"]
    step = torch.full((), group["step"], dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        first,
        second,
        [],
        [step] * len(params),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


_UPDATES = {"cuda": _update_in_one_pass}
"""Updates by the kind of device that has a faster one than `_update_in_passes`."""


def use_where_fused_adam_is_missing() -> None:
    """Make megatron-core use this class, unless it has FusedAdam from Transformer Engine or apex."""
    optimizer, distributed = megatron.core.optimizer, megatron.core.optimizer.distrib_optimizer
    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.Adam = distributed.Adam = AdamW
        optimizer.USING_PYTORCH_OPTIMIZER = False
        distributed.HAVE_APEX_OR_TE = True
        distributed.USING_APEX_OPTIMIZER = True

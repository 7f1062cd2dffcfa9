"""The output head and every loss on it: one sweep over chunks of tokens that makes values and gradients together.

Axes: ``T`` tokens, ``R`` rows (the tokens that carry weight), ``H`` hidden, ``v`` this rank's slice of the vocabulary
``V``.

A chunk's logits are made once, turned into statistics, merged over the group by one all-gather, and overwritten by
their own gradient, from which dHidden and dWeight follow at once. So no ``[T, V]`` tensor exists, and the backward only
multiplies by the incoming gradient and adds dHidden up over the group. The price is that each token's weight must be
known before the sweep. Formulas and precision are in ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.errors import UsageError
from megakd.losses.kernels.choose import Implementation
from megakd.losses.logit_sources import HeadStudent
from megakd.losses.main_grad import add_to_main_grad, claim_main_grad, main_grad_of
from megakd.losses.rows import (
    KD,
    HeadOutput,
    Select,
    check_shapes,
    head_output,
    make_rows,
)
from megakd.losses.sweep import DEFAULT_CHUNK_BYTES, default_chunk_bytes, sweep
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import VocabShard

__all__ = ["DEFAULT_CHUNK_BYTES", "KD", "HeadOutput", "KDTerm", "VocabShard", "default_chunk_bytes", "head_loss"]

HiddenGrad = Literal["all_reduce", "partial"]
WeightGrad = Literal["autograd", "main_grad"]


def head_loss(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    *,
    shard: VocabShard,
    lm_weight_T: Tensor,
    z_weight_T: Tensor | None = None,
    kd: Sequence[KD] = (),
    hidden_grad: HiddenGrad = "all_reduce",
    weight_grad: WeightGrad = "autograd",
    every_token: bool = False,
    implementation: Implementation = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadOutput:
    """LM loss, z-loss and any number of distillation terms of an output head whose vocabulary is split over a group.

    All ranks of ``shard.group`` call this with the same hidden states, labels, weights of tokens and sparse targets.
    Tokens whose weights are all 0 are dropped before any arithmetic, so NaN there changes nothing. Where no gradient is
    wanted (under ``torch.no_grad``, or if no input requires one) only values are computed.

    hidden_TH: ``[T, H]`` final hidden states, whole sequence (gathered, under sequence parallelism).
    weight_vH: ``[v, H]`` this rank's rows of the output weight; padding rows must be finite. If it has megatron's
        buffer for gradients (``main_grad``), its gradient is added there in the backward, in the buffer's precision.
    labels_T: ``[T]`` int64 vocabulary ids. Any value where lm_weight_T is 0, unless a divergence uses the label.
    lm_weight_T: ``[T]`` the weight of each token in the LM loss.
    z_weight_T: ``[T]`` the weight of the squared log-sum-exp of its logits (z-loss), or None.
    kd: the distillation terms. Dense targets bring hidden states and the teacher's head rows for the same slice.
    hidden_grad: ``"all_reduce"`` adds dHidden up over the group in the backward; ``"partial"`` leaves this rank's part
        to a caller that reduce-scatters it.
    weight_grad: ``"autograd"`` takes any incoming gradient of the loss. ``"main_grad"`` adds the weight's gradient to
        megatron's buffer during the sweep, if there is one in the precision of the sums: for a loss that is always
        followed by its backward, with an incoming gradient of exactly 1, which is asserted without a wait.
    every_token: every token is known to carry weight. Else the weights tell, for which the host waits for the device.
    implementation: the kernels that sweep the logits; ``"auto"`` is the fastest that can.
    chunk_bytes: upper bound of the memory for one chunk's logits, of all models together.

    Raises UsageError for shapes that do not fit, divergences that are wrong for their targets, and, on CPU, for a label
    with weight that is no vocabulary id. (On other devices that check would stall the queue; such a label makes the
    loss NaN there.)
    """
    check_shapes(
        ("hidden_TH", hidden_TH, (hidden_TH.shape[0], weight_vH.shape[-1])),
        ("weight_vH", weight_vH, (shard.num_rows, weight_vH.shape[-1])),
        ("labels_T", labels_T, (hidden_TH.shape[0],)),
    )
    if hidden_grad not in get_args(HiddenGrad):
        raise UsageError(f"hidden_grad {hidden_grad!r} is not one of {', '.join(get_args(HiddenGrad))}")
    if weight_grad not in get_args(WeightGrad):
        raise UsageError(f"weight_grad {weight_grad!r} is not one of {', '.join(get_args(WeightGrad))}")
    if hidden_TH.dtype != weight_vH.dtype:
        raise UsageError(f"hidden states are {hidden_TH.dtype} and the weight {weight_vH.dtype}: expected one dtype")
    wants_hidden = torch.is_grad_enabled() and hidden_TH.requires_grad
    wants_weight = torch.is_grad_enabled() and weight_vH.requires_grad
    main_grad_vH = main_grad_of(weight_vH) if wants_weight and weight_grad == "main_grad" else None
    with torch.no_grad():
        num_tokens = hidden_TH.shape[0]
        if every_token:
            select = Select.all_of(num_tokens, lm_weight_T, z_weight_T, kd)
        else:
            select = Select.of(num_tokens, lm_weight_T, z_weight_T, kd)
        rows = make_rows(select, labels_T, lm_weight_T, z_weight_T, kd, shard)
        student = HeadStudent(
            select(hidden_TH),
            weight_vH.detach(),
            wants_hidden=wants_hidden,
            wants_weight=wants_weight,
            sum_vH=main_grad_vH,
        )
        swept = sweep(student, rows, shard=shard, implementation=implementation, chunk_bytes=chunk_bytes)
        output = head_output(swept, rows, kd, select, shard.vocab_size)
        d_hidden_TH = None if student.d_hidden_RH is None else select.put(student.d_hidden_RH)
    if not (wants_hidden or wants_weight):
        return output
    group = shard.group if hidden_grad == "all_reduce" and shard.world_size > 1 else None
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_vH, output.loss, d_hidden_TH, student.d_weight_vH, main_grad_vH is not None, group
    )
    return replace(output, loss=loss)


class _Loss(torch.autograd.Function):
    """A loss whose gradients were made with it; the backward scales them and adds dHidden up over the group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_vH: Tensor,
        loss: Tensor,
        d_hidden_TH: Tensor | None,
        d_weight_vH: Tensor | None,
        in_main_grad: bool,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden_TH, d_weight_vH)
        ctx.weight_vH = weight_vH  # the parameter itself, for megatron's buffers that are its attributes
        ctx.in_main_grad, ctx.group = in_main_grad, group
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TH, d_weight_vH = ctx.saved_tensors
        if d_hidden_TH is not None:
            d_hidden_TH = d_hidden_TH * grad  # grad has no axes, so torch does not round it to the dtype of d_hidden
            if ctx.group is not None:
                dist.all_reduce(d_hidden_TH, group=ctx.group)
        if d_weight_vH is not None:
            d_weight_vH = add_to_main_grad(ctx.weight_vH, d_weight_vH, grad)
        elif ctx.in_main_grad:
            torch._assert_async(grad == 1)
            d_weight_vH = claim_main_grad(ctx.weight_vH)
        return d_hidden_TH, d_weight_vH, None, None, None, None, None

"""The same losses from logits that exist, for those who have made them: values and gradient in one pass, in place.

Axes: ``T`` tokens, ``v`` this rank's slice of the vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.losses.kernels.choose import Implementation, kernels_for
from megakd.losses.kernels.protocol import Chunk
from megakd.losses.kernels.reference import ReferenceKernels
from megakd.losses.logit_sources import GivenLogits, GivenStudent
from megakd.losses.rows import KD, HeadOutput, Select, check_shapes, head_output, make_rows
from megakd.losses.sweep import SweptTerm, sweep
from megakd.losses.vocab_parallel import VocabShard

_COPIED_BYTES = 32 << 20


def logits_loss(
    student_Tv: Tensor,
    labels_T: Tensor,
    *,
    shard: VocabShard,
    lm_weight_T: Tensor,
    z_weight_T: Tensor | None = None,
    kd: Sequence[KD] = (),
    inplace: bool = False,
    implementation: Implementation = "auto",
    chunk_bytes: int | None = None,
) -> HeadOutput:
    """``head.head_loss`` from the student's logits ``[T, v]``, contiguous; teachers as logits or sparse.

    inplace: the logits become their gradient, at once; nobody may read them afterwards (autograd refuses if an
        operation before has kept them for its backward; a matrix product has not). Else a copy does.
    chunk_bytes: how many bytes of logits, of all models together, are done at a time. Unless given: 32 MiB, but
        everything at once, and so with one all-gather in all, where the vocabulary is split and no logits have to be
        copied (contiguous, every token with weight, one term, and neither taid nor adaptive_kl).

    Raises UsageError as ``head_loss`` does.
    """
    check_shapes(
        ("student_Tv", student_Tv, (student_Tv.shape[0], shard.num_rows)),
        ("labels_T", labels_T, (student_Tv.shape[0],)),
    )
    wants_gradient = torch.is_grad_enabled() and student_Tv.requires_grad
    with torch.no_grad():
        select = Select.of(student_Tv.shape[0], lm_weight_T, z_weight_T, kd)
        rows = make_rows(select, labels_T, lm_weight_T, z_weight_T, kd, shard)
        logits_Tv = student_Tv.detach()
        if wants_gradient and not (inplace and logits_Tv.is_contiguous()):
            logits_Tv = logits_Tv.clone(memory_format=torch.contiguous_format)
        elif not logits_Tv.is_contiguous():
            logits_Tv = logits_Tv.contiguous()
        student = GivenStudent(logits_Tv, None if select.everything else select.rows_R, wants_gradient=wants_gradient)
        chunk_bytes = chunk_bytes or _chunk_bytes(student, rows.terms, shard, implementation)
        swept = sweep(student, rows, shard=shard, implementation=implementation, chunk_bytes=chunk_bytes)
        output = head_output(swept, rows, kd, select, shard.vocab_size)
        if wants_gradient and not select.everything:
            select.clear_others(logits_Tv)
    if not wants_gradient:
        return output
    if logits_Tv.data_ptr() == student_Tv.data_ptr():
        # kernels write past autograd: it must know, to refuse where somebody has kept these logits for a backward
        torch.autograd.graph.increment_version(student_Tv)
    loss: Tensor = _Loss.apply(student_Tv, output.loss, logits_Tv)  # type: ignore[no-untyped-call]
    return replace(output, loss=loss)


def _chunk_bytes(
    student: GivenStudent, terms: Sequence[SweptTerm], shard: VocabShard, implementation: Implementation
) -> int:
    """Everything at once only where a chunk needs no memory of its own."""
    copies = student.copies or len(terms) > 1
    for term in terms:
        copies |= term.term.divergence in ("taid", "adaptive_kl")
        copies |= isinstance(term.teacher, GivenLogits) and term.teacher.copies
    none_R = student.logits_Tv.new_zeros(0)
    example = Chunk(student.logits_Tv[:0], shard.num_valid, none_R.long(), none_R)
    copies |= isinstance(kernels_for(example, implementation), ReferenceKernels)
    return _COPIED_BYTES if copies or shard.world_size == 1 else sys.maxsize


class _Loss(torch.autograd.Function):
    """A loss whose gradient was made with it; the backward scales that, in place."""

    @staticmethod
    def forward(ctx: Any, student_Tv: Tensor, loss: Tensor, gradient_Tv: Tensor) -> Tensor:
        ctx.gradient_Tv = gradient_Tv
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient_Tv, ctx.gradient_Tv = ctx.gradient_Tv, None
        if gradient_Tv is None:
            raise RuntimeError("logits_loss keeps one gradient: a second backward over it has nothing left")
        if grad.device.type != "cpu" or grad != 1:  # looking is free on CPU alone
            gradient_Tv.mul_(grad)  # which has no axes: it is not rounded to the dtype of the other
        return gradient_Tv, None, None

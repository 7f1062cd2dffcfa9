"""Losses on logits that the caller has made: values and gradient in one pass, in place if asked for.

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
    """LM loss, z-loss and any number of distillation terms of logits that exist already.

    For training loops that make the student's logits themselves. ``head.head_loss`` computes the same losses from
    hidden states and never holds ``[T, V]`` logits; with an output head at hand it is the better choice.

    student_Tv: ``[T, v]`` fp32, bf16, fp16 or fp64: this rank's slice of the student's logits.
    labels_T, shard, lm_weight_T, z_weight_T, implementation: as for ``head.head_loss``. On one process the shard is
        ``VocabShard(0, V, V, None)``.
    kd: the distillation terms, with targets ``LogitTargets`` (the teacher's logits ``[T, v]``, same slice) or
        ``SparseTargets``.
    inplace: True overwrites the logits with their gradient at once. Nobody may read them afterwards; autograd refuses
        the backward if an earlier operation kept them for its own (a matrix product does not). False works on a copy.
    chunk_bytes: bytes of logits, of all models together, that are worked on at a time; None is 32 MiB, or all at once
        with one all-gather where the vocabulary is split and no logits must be copied (contiguous, every token with
        weight, one term, and neither taid nor adaptive_kl).

    Returns the loss, differentiable once by the logits, and detached values per token. Raises UsageError as
    ``head_loss`` does.

    >>> import torch
    >>> from megakd.losses.head import KD, KDTerm, VocabShard
    >>> from megakd.losses.logits import logits_loss
    >>> from megakd.targets import LogitTargets
    >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    >>> half = torch.full((2,), 0.5)
    >>> output = logits_loss(
    ...     student,
    ...     torch.tensor([0, 1]),
    ...     shard=VocabShard(0, 3, 3, None),
    ...     lm_weight_T=half,
    ...     kd=[KD(KDTerm("forward_kl", temperature=2.0), LogitTargets(teacher), half)],
    ... )
    >>> output.loss.backward()
    >>> print(f"loss {output.loss:.4f}, gradient {tuple(student.grad.shape)}, top-1 {output.kd[0].agree_T.tolist()}")
    loss 0.6930, gradient (2, 3), top-1 [True, False]
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
        # Autograd does not see kernels write; it must refuse if an operation kept these logits for its backward.
        torch.autograd.graph.increment_version(student_Tv)
    loss: Tensor = _Loss.apply(student_Tv, output.loss, logits_Tv)  # type: ignore[no-untyped-call]
    return replace(output, loss=loss)


def _chunk_bytes(
    student: GivenStudent, terms: Sequence[SweptTerm], shard: VocabShard, implementation: Implementation
) -> int:
    """Bytes of logits to do at a time: everything at once only where a chunk needs no memory of its own."""
    copies = student.copies or len(terms) > 1
    for term in terms:
        copies |= term.term.divergence in ("taid", "adaptive_kl")
        copies |= isinstance(term.teacher, GivenLogits) and term.teacher.copies
    none_R = student.logits_Tv.new_zeros(0)
    example = Chunk(student.logits_Tv[:0], shard.num_valid, none_R.long(), none_R)
    copies |= isinstance(kernels_for(example, implementation), ReferenceKernels)
    return _COPIED_BYTES if copies or shard.world_size == 1 else sys.maxsize


class _Loss(torch.autograd.Function):
    """A loss whose gradient was made with it; the backward scales that gradient in place."""

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
        if grad.device.type != "cpu" or grad != 1:  # reading grad stalls the queue on any device but the CPU
            gradient_Tv.mul_(grad)  # grad has no axes, so torch does not round it to the dtype of gradient_Tv
        return gradient_Tv, None, None

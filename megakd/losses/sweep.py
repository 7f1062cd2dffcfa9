"""The walk over chunks of tokens: logits, statistics, merge, and the gradient products, one chunk at a time.

Axes: ``R`` rows (the tokens that are computed), ``H`` hidden, ``v`` this rank's slice of the vocabulary, ``k``
statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.kernels import Chunk, KDTerm, Kernels, Teacher, statistics_columns
from megakd.losses.vocab_parallel import RowStatistics, VocabShard, gather_statistics

_PRODUCT_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's side of a sweep: hidden states ``[R, H_teacher]``, head rows ``[v, H_teacher]``, weights
    ``[R]``."""

    hidden_RH: Tensor
    weight_vH: Tensor
    kd_weight_R: Tensor
    term: KDTerm


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves.

    statistics: merged over the group, of all rows.
    d_hidden_RH: this rank's part of the gradient by the hidden states, in their dtype.
    d_weight_vH: gradient by the weight; fp32 for a bf16 weight when it was added up over several chunks.
    """

    statistics: RowStatistics
    d_hidden_RH: Tensor | None
    d_weight_vH: Tensor | None


def sweep(
    hidden_RH: Tensor,
    weight_vH: Tensor,
    labels_R: Tensor,
    lm_weight_R: Tensor,
    *,
    teacher: TeacherRows | None,
    shard: VocabShard,
    wants_hidden: bool,
    wants_weight: bool,
    kernels: Kernels,
    chunk_bytes: int,
) -> Swept:
    """Walk over the rows. One all-gather a chunk, no other collective; gradients only where they are wanted."""
    num_rows, num_columns = hidden_RH.shape[0], weight_vH.shape[0]
    row_bytes = num_columns * hidden_RH.element_size()
    if teacher is not None:
        row_bytes += num_columns * teacher.hidden_RH.element_size()
    chunk_rows = _even_chunk(num_rows, most=max(1, chunk_bytes // row_bytes))

    wide = torch.promote_types(weight_vH.dtype, torch.float32)
    d_hidden_RH = hidden_RH.new_empty(hidden_RH.shape) if wants_hidden else None
    d_weight_vH = None
    if wants_weight:
        d_weight_vH = torch.zeros_like(weight_vH, dtype=wide if num_rows > chunk_rows else weight_vH.dtype)

    # One buffer for all chunks: fresh memory for each would cost more in page faults than the statistics do.
    student_Rv = hidden_RH.new_empty(chunk_rows, num_columns)
    teacher_Rv = None if teacher is None else teacher.hidden_RH.new_empty(chunk_rows, num_columns)
    columns = statistics_columns(None if teacher is None else teacher.term)
    statistics_kR = hidden_RH.new_empty(len(columns), num_rows, dtype=wide)

    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        size = rows.stop - rows.start
        chunk_teacher = None
        if teacher is not None and teacher_Rv is not None:
            torch.mm(teacher.hidden_RH[rows], teacher.weight_vH.t(), out=teacher_Rv[:size])
            chunk_teacher = Teacher(teacher_Rv[:size], teacher.kd_weight_R[rows], teacher.term)
        chunk = Chunk(
            student_Rv=torch.mm(hidden_RH[rows], weight_vH.t(), out=student_Rv[:size]),
            num_valid=shard.num_valid,
            label_R=labels_R[rows] - shard.start,
            lm_weight_R=lm_weight_R[rows],
            teacher=chunk_teacher,
        )
        merged, gradient_Rv = _statistics_and_gradient(chunk, shard, kernels, gradient=wants_hidden or wants_weight)
        statistics_kR[:, rows] = merged.values_kR
        if gradient_Rv is not None:
            if d_hidden_RH is not None:
                torch.mm(gradient_Rv, weight_vH, out=d_hidden_RH[rows])
            if d_weight_vH is not None:
                _add_product_inplace(d_weight_vH, gradient_Rv, hidden_RH[rows])
    return Swept(RowStatistics(columns, statistics_kR), d_hidden_RH, d_weight_vH)


def _statistics_and_gradient(
    chunk: Chunk, shard: VocabShard, kernels: Kernels, *, gradient: bool
) -> tuple[RowStatistics, Tensor | None]:
    if gradient and shard.world_size == 1:
        return kernels.statistics_and_gradient(chunk)
    term = KDTerm() if chunk.teacher is None else chunk.teacher.term
    merged = gather_statistics(
        kernels.statistics(chunk),
        shard=shard,
        student_temperature=term.student_temperature,
        teacher_temperature=term.temperature,
    )
    return merged, kernels.gradient(chunk, merged) if gradient else None


def _even_chunk(num_rows: int, *, most: int) -> int:
    """Rows of a chunk, at least 1 and at most ``most``, so that chunks are of even size."""
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))


def _add_product_inplace(sum_vH: Tensor, gradient_Rv: Tensor, hidden_RH: Tensor) -> None:
    """sum += gradientᵀ · hidden, accumulated over chunks in the dtype of the sum."""
    if sum_vH.dtype == gradient_Rv.dtype:
        sum_vH.addmm_(gradient_Rv.t(), hidden_RH)
        return
    # A narrow product goes through a block that stays in cache, so that the wide sum is the only memory traffic.
    block = max(1, _PRODUCT_BLOCK_BYTES // (hidden_RH.shape[1] * hidden_RH.element_size()))
    for start in range(0, sum_vH.shape[0], block):
        sum_vH[start : start + block] += torch.mm(gradient_Rv[:, start : start + block].t(), hidden_RH)

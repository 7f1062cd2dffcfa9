"""The protocol of kernels: the work on one chunk of logits that every implementation offers.

Axes: ``R`` rows (tokens of the chunk), ``v`` this rank's slice of the vocabulary, ``K`` listed ids, ``k`` statistics of
a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megakd.losses.divergences import DIVERGENCES
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import DENSE_COLUMNS, LM_COLUMNS, SPARSE_COLUMNS, SPREAD_COLUMNS, RowStatistics


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher's side of a chunk: logits ``[R, v]``, read only, and each row's weight ``[R]``, fp32."""

    logits_Rv: Tensor
    weight_R: Tensor
    term: KDTerm

    @property
    def columns(self) -> tuple[str, ...]:
        return DENSE_COLUMNS + DIVERGENCES[self.term.formula].first_pass


@dataclass(frozen=True)
class SparseTeacher:
    """The sparse teacher's side of a chunk: the columns of the listed ids in this slice.

    columns_RK: int64; negative or >= num_valid where the slot is empty or another rank holds the id. No column stands
    twice in a row.
    """

    columns_RK: Tensor
    term: KDTerm

    @property
    def columns(self) -> tuple[str, ...]:
        return SPARSE_COLUMNS + (SPREAD_COLUMNS if self.term.tail == "spread" else ())


@dataclass(frozen=True)
class Chunk:
    """Input of a kernel.

    student_Rv: the student's logits. ``gradient`` may overwrite them with their gradient.
    num_valid: leading columns that are not padding.
    label_R: int64, the label's column in this slice; negative or >= num_valid where another rank holds it.
    lm_weight_R: fp32. A weight of 0 takes the LM loss out of the gradient before any arithmetic.
    z_weight_R: fp32, the weight of log-sum-exp squared (z-loss), or None.
    teacher: the teacher's side; None for the LM loss alone.
    """

    student_Rv: Tensor
    num_valid: int
    label_R: Tensor
    lm_weight_R: Tensor
    z_weight_R: Tensor | None = None
    teacher: DenseTeacher | SparseTeacher | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the statistics of a row, in order."""
        return LM_COLUMNS if self.teacher is None else LM_COLUMNS + self.teacher.columns


@dataclass(frozen=True)
class SparseSlope:
    """The gradient of a sparse target's weighted divergence by the student's logits (tau_s included).

    At an id that is not listed it is factor_R · exp((s - rest_max) / tau_s) - shift_R, at the listed ids listed_KR.
    In rows without weight it is exactly 0 everywhere.
    """

    factor_R: Tensor
    shift_R: Tensor
    listed_KR: Tensor


class Kernels(Protocol):
    """One implementation of the work on a chunk."""

    def supports(self, chunk: Chunk) -> bool:
        """Return whether this implementation can do the chunk: its device, dtypes and divergence."""

    def statistics(self, chunk: Chunk) -> RowStatistics:
        """Return ``chunk.columns`` of this slice of every row.

        With a sparse teacher they are followed by the logits of the listed ids, one line for each slot, 0 where this
        rank does not hold the id.
        """

    def second_pass(self, chunk: Chunk, rows: RowStatistics) -> RowStatistics:
        """Return this slice's share of the divergence's ``second_pass`` columns, plain sums.

        rows: the merged statistics of the first pass.
        """

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        """Return the derivative of the chunk's weighted loss by its logits, ``[R, v]`` in the student's dtype.

        rows: merged statistics of both passes. slope: the divergence's share, if the teacher is sparse.
        """

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        """Return both at once, for a slice that is the whole vocabulary; not for sparse teachers nor adaptive_kl."""

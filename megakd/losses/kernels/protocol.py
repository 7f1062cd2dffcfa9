"""The work on one chunk of logits, as every implementation must offer it.

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
    """Ids that a sparse target lists, as columns of this slice: int64 ``[R, K]``, negative or >= num_valid where the
    slot is empty or another rank holds the id. Each column at most once in a row."""

    columns_RK: Tensor
    term: KDTerm

    @property
    def columns(self) -> tuple[str, ...]:
        return SPARSE_COLUMNS + (SPREAD_COLUMNS if self.term.tail == "spread" else ())


@dataclass(frozen=True)
class Chunk:
    """What a kernel is given.

    student_Rv: the student's logits. ``gradient`` may overwrite them with their gradient.
    num_valid: leading columns that are not padding.
    label_R: int64, the label's column in this slice; negative or >= num_valid where another rank holds it.
    lm_weight_R: fp32. A weight of 0 takes its term out of the gradient before any arithmetic.
    z_weight_R: fp32, the weight of log-sum-exp squared, or None.
    """

    student_Rv: Tensor
    num_valid: int
    label_R: Tensor
    lm_weight_R: Tensor
    z_weight_R: Tensor | None = None
    teacher: DenseTeacher | SparseTeacher | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The statistics of a row, in order."""
        return LM_COLUMNS if self.teacher is None else LM_COLUMNS + self.teacher.columns


@dataclass(frozen=True)
class SparseSlope:
    """The gradient of a sparse target's weighted divergence by the student's logits (tau_s included).

    At an id that is not listed: factor_R · exp((s - rest_max) / tau_s) - shift_R. At the listed ids: listed_KR.
    Exactly 0 everywhere in rows without weight.
    """

    factor_R: Tensor
    shift_R: Tensor
    listed_KR: Tensor


class Kernels(Protocol):
    """One implementation."""

    def supports(self, chunk: Chunk) -> bool:
        """Whether this implementation can do the chunk: device, dtypes, divergence."""

    def statistics(self, chunk: Chunk) -> RowStatistics:
        """``chunk.columns`` of this slice of every row; with a sparse teacher the logits of its ids behind them, a
        line an id, 0 where this rank lacks it."""

    def second_pass(self, chunk: Chunk, rows: RowStatistics) -> RowStatistics:
        """This slice's share of the divergence's ``second_pass`` columns, from merged first statistics. Plain sums."""

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        """``[R, v]``, the student's dtype: derivative of the chunk's weighted loss by its logits, from merged
        statistics; ``slope`` is the divergence's share where the teacher is sparse."""

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        """All at once where the slice is the whole vocabulary; not for sparse teachers nor adaptive_kl."""

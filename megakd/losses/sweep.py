"""The walk over chunks of tokens: logits, statistics, merge, values and gradient, one chunk at a time.

Axes: ``R`` rows (the tokens that are computed), ``H`` hidden, ``v`` this rank's slice of the vocabulary, ``k``
statistics.

Where the vocabulary is split, the all-gather of one chunk's statistics is under way while the next chunk's logits are
made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megakd.losses.adaptive_kl import head_and_tail_gap
from megakd.losses.divergences import DIVERGENCES, teacher_entropy
from megakd.losses.kernels.choose import Implementation, kernels_for
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, Kernels, SparseSlope, SparseTeacher
from megakd.losses.logit_sources import Logits, StudentLogits
from megakd.losses.sparse import Buckets, sparse_values
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import LM_COLUMNS, Gather, RowStatistics, VocabShard, merge_statistics

DEFAULT_CHUNK_BYTES = 256 << 20
"""Bytes of logits in a chunk. Larger chunks make faster products and fewer additions to the weight's gradient; smaller
ones need less memory."""

_CUDA_CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class SweptTerm:
    """One divergence of a sweep: its term, its weight in each row ``[R]``, the teacher's logits or sparse targets."""

    term: KDTerm
    weight_R: Tensor
    teacher: Logits | Buckets


@dataclass(frozen=True)
class TermRows:
    """Results of a sweep for one term, ``[R]`` each.

    value_R: the divergence in nats, temperature² included. agree_R: bool, True if the top-1 ids agree. entropy_R: the
    teacher's entropy in nats; None for sparse targets.
    """

    value_R: Tensor
    agree_R: Tensor
    entropy_R: Tensor | None


@dataclass(frozen=True)
class Swept:
    """Results of a sweep: the LM statistics of all rows, merged over the group, and the values of every term."""

    lm: RowStatistics
    terms: list[TermRows]


@dataclass(frozen=True)
class SweepRows:
    """Input of a sweep beside the logits, row by row.

    labels_R: int64 ``[R]``. lm_weight_R, z_weight_R: ``[R]``, the weights of LM loss and z-loss; None for no z-loss.
    terms: the divergences.
    """

    labels_R: Tensor
    lm_weight_R: Tensor
    z_weight_R: Tensor | None
    terms: Sequence[SweptTerm]


def default_chunk_bytes(device: torch.device) -> int:
    """Return the bytes of logits in a chunk on ``device``.

    On CUDA each chunk reads and writes the whole fp32 gradient of the output weight, so that fewer are faster.
    """
    return _CUDA_CHUNK_BYTES if device.type == "cuda" else DEFAULT_CHUNK_BYTES


def sweep(
    student: StudentLogits,
    rows: SweepRows,
    *,
    shard: VocabShard,
    implementation: Implementation,
    chunk_bytes: int,
) -> Swept:
    """Walk over the rows: one all-gather a chunk, and one more for terms with sums of a ``second_pass``.

    The gradient goes to ``student.take`` where the student wants it.
    """
    walk = _Walk(student, rows, shard, implementation)
    chunk_rows = _even_chunk(student.num_rows, most=max(1, chunk_bytes // walk.row_bytes))
    walk.allocate(chunk_rows)
    pending: _Work | None = None
    for start in range(0, student.num_rows, chunk_rows):
        work = walk.begin(slice(start, min(start + chunk_rows, student.num_rows)))
        if pending is not None:
            walk.finish(pending)
            pending = None
        if work.gather is None:
            walk.finish(work)
        else:
            pending = work
    if pending is not None:
        walk.finish(pending)
    return walk.swept()


@dataclass
class _TermInChunk:
    """One term (or the LM loss alone) on one chunk. Its statistics are those of this slice, then of whole rows."""

    chunk: Chunk
    kernels: Kernels
    term: SweptTerm | None
    statistics: RowStatistics
    gradient_Rv: Tensor | None = None
    slope: SparseSlope | None = None


@dataclass
class _Work:
    rows: slice
    parts: list[_TermInChunk]
    gather: Gather | None


class _Walk:
    """State of one sweep: the buffers that all chunks share, and the results of all rows."""

    def __init__(
        self, student: StudentLogits, rows: SweepRows, shard: VocabShard, implementation: Implementation
    ) -> None:
        self._student, self._rows, self._terms = student, rows, rows.terms
        self._shard, self._implementation = shard, implementation
        self._split = shard.world_size > 1
        # Fresh memory for each chunk would cost more in page faults than the statistics take. While a gather is under
        # way the next chunk's logits need a buffer of their own.
        self._num_buffers = 2 if self._split else 1
        self._turn = 0
        wide = torch.promote_types(student.dtype, torch.float32)
        device = rows.labels_R.device
        self._lm_kR = torch.empty(len(LM_COLUMNS), student.num_rows, dtype=wide, device=device)
        self._results = [
            TermRows(
                value_R=torch.empty(student.num_rows, dtype=wide, device=device),
                agree_R=torch.empty(student.num_rows, dtype=torch.bool, device=device),
                entropy_R=None
                if isinstance(term.teacher, Buckets)
                else torch.empty(student.num_rows, dtype=wide, device=device),
            )
            for term in rows.terms
        ]

    @property
    def row_bytes(self) -> int:
        """Bytes of the buffers for one row's logits."""
        copies = max(1, len(self._terms)) if self._student.wants_gradient else 1
        sources: list[tuple[Logits | StudentLogits, int]] = [(self._student, copies)]
        sources += [(term.teacher, 1) for term in self._terms if not isinstance(term.teacher, Buckets)]
        size = sum(copies * source.width * source.dtype.itemsize for source, copies in sources)
        size += sum(4 * self._student.width for term in self._terms if term.term.divergence == "taid")
        return max(1, self._num_buffers * size)

    def allocate(self, chunk_rows: int) -> None:
        """Make the buffers, for chunks of at most this many rows."""

        def make(source: Logits | StudentLogits) -> list[Tensor | None]:
            return [source.buffer(chunk_rows) for _ in range(self._num_buffers)]

        self._student_buffers = make(self._student)
        self._teacher_buffers = [
            [None] * self._num_buffers if isinstance(term.teacher, Buckets) else make(term.teacher)
            for term in self._terms
        ]

    def begin(self, rows: slice) -> _Work:
        """Make logits and statistics of a chunk and start their gather; where nothing is split, its gradient too."""
        turn, self._turn = self._turn, (self._turn + 1) % self._num_buffers
        student_Rv = self._student.logits(rows, self._student_buffers[turn])
        parts = []
        for index, term in enumerate(self._terms or [None]):
            # Each term overwrites a copy of the logits with its gradient; the LM loss goes with the first term.
            logits_Rv = student_Rv if index == 0 or not self._student.wants_gradient else student_Rv.clone()
            chunk = self._chunk(rows, logits_Rv, with_lm=index == 0)
            if term is not None:
                buffer = self._teacher_buffers[index][turn]
                chunk = replace(chunk, teacher=self._teacher(term, rows, student_Rv, buffer))
            kernels = kernels_for(chunk, self._implementation)
            parts.append(_TermInChunk(chunk, kernels, term, RowStatistics((), self._lm_kR)))
        for part in parts:
            if self._student.wants_gradient and self._at_once(part):
                part.statistics, part.gradient_Rv = part.kernels.statistics_and_gradient(part.chunk)
            else:
                part.statistics = part.kernels.statistics(part.chunk)
        gather = Gather([part.statistics.values_kR for part in parts], self._shard) if self._split else None
        return _Work(rows, parts, gather)

    def finish(self, work: _Work) -> None:
        """Make values and gradient of a chunk, from the statistics of whole rows."""
        if work.gather is not None:
            for part, parts_nkR in zip(work.parts, work.gather.wait()):
                part.statistics = _merged(part, parts_nkR)
        self._add_second_pass(work.parts)
        self._lm_kR[:, work.rows] = work.parts[0].statistics.values_kR[: len(LM_COLUMNS)]
        for part, result in zip(work.parts, self._results):
            self._keep(part, result, work.rows)
        if not self._student.wants_gradient:
            return
        gradient_Rv = None
        for part in work.parts:
            if part.gradient_Rv is None:
                part.gradient_Rv = part.kernels.gradient(part.chunk, part.statistics, part.slope)
            gradient_Rv = part.gradient_Rv if gradient_Rv is None else gradient_Rv.add_(part.gradient_Rv)
        assert gradient_Rv is not None
        self._student.take(work.rows, gradient_Rv)

    def swept(self) -> Swept:
        return Swept(RowStatistics(LM_COLUMNS, self._lm_kR), self._results)

    def _chunk(self, rows: slice, student_Rv: Tensor, *, with_lm: bool) -> Chunk:
        lm_weight_R, z_weight_R = self._rows.lm_weight_R[rows], self._rows.z_weight_R
        return Chunk(
            student_Rv=student_Rv,
            num_valid=self._shard.num_valid,
            label_R=self._rows.labels_R[rows] - self._shard.start,
            lm_weight_R=lm_weight_R if with_lm else torch.zeros_like(lm_weight_R),
            z_weight_R=z_weight_R[rows] if with_lm and z_weight_R is not None else None,
        )

    def _teacher(
        self, term: SweptTerm, rows: slice, student_Rv: Tensor, buffer: Tensor | None
    ) -> DenseTeacher | SparseTeacher:
        if isinstance(term.teacher, Buckets):
            ids_RK = term.teacher.ids_RK[rows]
            columns_RK = torch.where(ids_RK < 0, -1, ids_RK - self._shard.start)
            return SparseTeacher(columns_RK, term.term)
        teacher_Rv = term.teacher.logits(rows, buffer)
        if term.term.divergence == "taid":
            teacher_Rv = _intermediate(student_Rv, teacher_Rv, term.term.taid_t)
        return DenseTeacher(teacher_Rv, term.weight_R[rows], term.term)

    def _at_once(self, part: _TermInChunk) -> bool:
        if self._split or isinstance(part.chunk.teacher, SparseTeacher):
            return False
        return part.term is None or part.term.term.formula != "adaptive_kl"

    def _add_second_pass(self, parts: list[_TermInChunk]) -> None:
        """Add the sums of the second pass, which need those of the first merged: one more gather, for all terms."""
        late = [part for part in parts if part.gradient_Rv is None and _second_pass_columns(part)]
        if not late:
            return
        sums = []
        for part in late:
            if part.term is not None and part.term.term.formula == "adaptive_kl":
                sums.append(head_and_tail_gap(part.chunk, part.statistics, self._shard, part.kernels))
            else:
                sums.append(part.kernels.second_pass(part.chunk, part.statistics))
        if self._split:
            gathered = Gather([rows.values_kR for rows in sums], self._shard).wait()
            sums = [RowStatistics(rows.columns, parts_nkR.sum(0)) for rows, parts_nkR in zip(sums, gathered)]
        for part, rows in zip(late, sums):
            part.statistics = part.statistics.extended(rows)

    def _keep(self, part: _TermInChunk, result: TermRows, rows: slice) -> None:
        assert part.term is not None
        term = part.term.term
        if isinstance(part.term.teacher, Buckets):
            values = sparse_values(part.statistics, part.term.teacher[rows], term, part.term.weight_R[rows])
            part.slope = values.slope
            result.value_R[rows], result.agree_R[rows] = values.value_R * term.scale, values.agree_R
            return
        result.value_R[rows] = DIVERGENCES[term.formula].value(part.statistics, term) * term.scale
        result.agree_R[rows] = part.statistics["agree"] > 0
        if result.entropy_R is not None:
            result.entropy_R[rows] = teacher_entropy(part.statistics, term)


def _second_pass_columns(part: _TermInChunk) -> tuple[str, ...]:
    teacher = part.chunk.teacher
    return DIVERGENCES[teacher.term.formula].second_pass if isinstance(teacher, DenseTeacher) else ()


def _merged(part: _TermInChunk, parts_nkR: Tensor) -> RowStatistics:
    term = KDTerm() if part.term is None else part.term.term
    return merge_statistics(
        part.chunk.columns,
        parts_nkR,
        student_temperature=term.student_temperature,
        teacher_temperature=term.temperature,
    )


def _intermediate(student_Rv: Tensor, teacher_Rv: Tensor, t: float) -> Tensor:
    """Logits of TAID's target (arXiv 2501.16937, equation 3): (1 - t) · student + t · teacher, the student held fixed.

    fp32, so that logits are not rounded twice.
    """
    if t in (0, 1):  # 0 · inf would be NaN
        return teacher_Rv if t == 1 else student_Rv.clone()
    wide_Rv = teacher_Rv.to(torch.promote_types(teacher_Rv.dtype, torch.float32), copy=True)
    return wide_Rv.mul_(t).add_(student_Rv, alpha=1 - t)


def _even_chunk(num_rows: int, *, most: int) -> int:
    """Rows of a chunk, at least 1 and at most ``most``, so that chunks are of even size."""
    num_chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // num_chunks))

"""The kernels in plain torch, on any device, bf16 to fp64: written to be read and to check the others against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megakd.losses.divergences import (
    DIVERGENCES,
    DenseEntries,
    centred_difference,
    column,
    finite_difference,
    logit_difference,
    pointwise_entries,
)
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, SparseSlope, SparseTeacher
from megakd.losses.pointwise import POINTWISE, product
from megakd.losses.vocab_parallel import RowStatistics, pivot


class ReferenceKernels:
    """``protocol.Kernels`` in plain torch. Arithmetic is fp32, or fp64 for fp64 logits."""

    def supports(self, chunk: Chunk) -> bool:
        return True

    def statistics(self, chunk: Chunk) -> RowStatistics:
        student_Rv = _masked(chunk.student_Rv, chunk.num_valid)
        lm_max_R = student_Rv.amax(1)
        values = {
            "lm_max": lm_max_R,
            "lm_sum": (student_Rv - column(pivot(lm_max_R))).exp().sum(1),
            "label": _at_label(student_Rv, _is_label(chunk)),
        }
        if isinstance(chunk.teacher, SparseTeacher):
            return _sparse_statistics(chunk, chunk.teacher, student_Rv, values)
        if chunk.teacher is not None:
            values |= _dense_statistics(chunk, chunk.teacher, student_Rv)
        return RowStatistics(chunk.columns, torch.stack([values[name] for name in chunk.columns]))

    def second_pass(self, chunk: Chunk, rows: RowStatistics) -> RowStatistics:
        assert isinstance(chunk.teacher, DenseTeacher)
        term = chunk.teacher.term
        dense = _dense_entries(chunk, chunk.teacher, rows)
        if term.formula == "centred_logit_mse":
            square_Rv = centred_difference(dense, rows, term)[:, : chunk.num_valid].square()
            return RowStatistics(("square",), square_Rv.sum(1).unsqueeze(0))
        entries, pointwise = pointwise_entries(dense, rows), POINTWISE[term.formula]
        sums = [function(entries, term)[:, : chunk.num_valid].sum(1) for function in (pointwise.value, pointwise.slope)]
        return RowStatistics(("value", "slope"), torch.stack(sums))

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        student_Rv, is_label_Rv = _masked(chunk.student_Rv, chunk.num_valid), _is_label(chunk)
        softmax_Rv = (student_Rv - column(pivot(rows["lm_max"]))).exp() / column(rows["lm_sum"])
        gradient_Rv = _weighted(chunk.lm_weight_R, softmax_Rv - is_label_Rv.to(softmax_Rv.dtype))
        if chunk.z_weight_R is not None:
            log_z_R = rows["lm_max"] + rows["lm_sum"].log()
            gradient_Rv += _weighted(chunk.z_weight_R, 2 * column(log_z_R) * softmax_Rv)
        if isinstance(chunk.teacher, SparseTeacher):
            assert slope is not None
            gradient_Rv += _sparse_gradient(chunk, chunk.teacher, student_Rv, rows, slope)
        elif chunk.teacher is not None:
            term = chunk.teacher.term
            slope_Rv = DIVERGENCES[term.formula].gradient(_dense_entries(chunk, chunk.teacher, rows), rows, term)
            gradient_Rv += _weighted(chunk.teacher.weight_R, slope_Rv * (term.scale / term.student_temperature))
        gradient_Rv[:, chunk.num_valid :] = 0.0  # also where the row is NaN
        return gradient_Rv.to(chunk.student_Rv.dtype)

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        rows = self.statistics(chunk)
        if isinstance(chunk.teacher, DenseTeacher) and DIVERGENCES[chunk.teacher.term.formula].second_pass:
            rows = rows.extended(self.second_pass(chunk, rows))
        return rows, self.gradient(chunk, rows)


def _dense_statistics(chunk: Chunk, teacher: DenseTeacher, student_Rv: Tensor) -> dict[str, Tensor]:
    term = teacher.term
    first = DIVERGENCES[term.formula].first_pass
    teacher_Rv = _masked(teacher.logits_Rv, chunk.num_valid).to(student_Rv.dtype)
    student_top_R, teacher_top_R = student_Rv.amax(1), teacher_Rv.amax(1)
    tops_Rv = (student_Rv == column(student_top_R)) & (teacher_Rv == column(teacher_top_R))
    values = {
        "student_top": student_top_R,
        "teacher_top": teacher_top_R,
        "agree": tops_Rv[:, : chunk.num_valid].any(1).to(student_Rv.dtype),
    }
    if "teacher_label" in first:
        is_label_Rv = _is_label(chunk)
        values["student_label"] = _at_label(student_Rv, is_label_Rv)
        values["teacher_label"] = _at_label(teacher_Rv, is_label_Rv)
        student_Rv, teacher_Rv = (x.masked_fill(is_label_Rv, -math.inf) for x in (student_Rv, teacher_Rv))
    values["student_max"], values["teacher_max"] = student_Rv.amax(1), teacher_Rv.amax(1)
    s_Rv = (student_Rv - column(pivot(values["student_max"]))) / term.student_temperature
    t_Rv = (teacher_Rv - column(pivot(values["teacher_max"]))) / term.temperature
    exp_s_Rv, exp_t_Rv = s_Rv.exp(), t_Rv.exp()
    values |= {
        "student_sum": exp_s_Rv.sum(1),
        "teacher_sum": exp_t_Rv.sum(1),
        "teacher_self": product(exp_t_Rv, t_Rv).sum(1),
    }
    if "forward" in first:
        values["forward"] = product(exp_t_Rv, t_Rv - s_Rv).sum(1)
    if "reverse" in first:
        values["reverse"] = product(exp_s_Rv, s_Rv - t_Rv).sum(1)
    if "count" in first:
        dense = DenseEntries(s_Rv, t_Rv, exp_t_Rv, exp_s_Rv, exp_s_Rv.bool())
        maxima = RowStatistics(
            ("student_max", "teacher_max"), torch.stack([values["student_max"], values["teacher_max"]])
        )
        difference_Rv = logit_difference(dense, maxima, term)
        values["difference"] = finite_difference(difference_Rv).sum(1)
        values["square"] = difference_Rv.square().sum(1)
        values["count"] = ((s_Rv > -math.inf) | (t_Rv > -math.inf)).sum(1).to(s_Rv.dtype)
    return values


def _dense_entries(chunk: Chunk, teacher: DenseTeacher, rows: RowStatistics) -> DenseEntries:
    term, is_label_Rv = teacher.term, _is_label(chunk)
    student_Rv = _masked(chunk.student_Rv, chunk.num_valid)
    teacher_Rv = _masked(teacher.logits_Rv, chunk.num_valid).to(student_Rv.dtype)
    if "teacher_label" in rows.columns:
        student_Rv, teacher_Rv = (x.masked_fill(is_label_Rv, -math.inf) for x in (student_Rv, teacher_Rv))
    s_Rv = (student_Rv - column(pivot(rows["student_max"]))) / term.student_temperature
    t_Rv = (teacher_Rv - column(pivot(rows["teacher_max"]))) / term.temperature
    p_Rv, q_Rv = _shares(t_Rv.exp(), rows["teacher_sum"]), _shares(s_Rv.exp(), rows["student_sum"])
    return DenseEntries(s_Rv, t_Rv, p_Rv, q_Rv, is_label_Rv)


def _shares(mass_Rv: Tensor, sum_R: Tensor) -> Tensor:
    """Mass over its sum, and 0 for all of a row without mass (a teacher certain of the label, which DKD leaves out)."""
    return torch.where(mass_Rv == 0, 0.0, mass_Rv / column(sum_R))


def _sparse_statistics(
    chunk: Chunk, teacher: SparseTeacher, student_Rv: Tensor, values: dict[str, Tensor]
) -> RowStatistics:
    owned_RK, index_RK = _owned(chunk, teacher)
    listed_RK = torch.where(owned_RK, student_Rv.gather(1, index_RK), 0.0)
    rest_Rv = student_Rv.masked_fill(_is_listed(chunk, teacher), -math.inf)
    tau = teacher.term.student_temperature
    values["rest_max"] = rest_Rv.amax(1)
    values["rest_sum"] = ((rest_Rv - column(pivot(values["rest_max"]))) / tau).exp().sum(1)
    valid_Rv = student_Rv[:, : chunk.num_valid]
    values["total"] = ((valid_Rv - column(pivot(values["lm_max"]))) / tau).sum(1)
    values["count"] = torch.full_like(values["lm_max"], chunk.num_valid)
    lines = torch.stack([values[name] for name in chunk.columns])
    return RowStatistics(chunk.columns, torch.cat([lines, listed_RK.t()]))


def _sparse_gradient(
    chunk: Chunk, teacher: SparseTeacher, student_Rv: Tensor, rows: RowStatistics, slope: SparseSlope
) -> Tensor:
    s_Rv = (student_Rv - column(pivot(rows["rest_max"]))) / teacher.term.student_temperature
    is_listed_Rv = _is_listed(chunk, teacher)
    rest_Rv = _weighted(slope.factor_R, s_Rv.exp()) - column(slope.shift_R)
    gradient_Rv = torch.where(is_listed_Rv, 0.0, rest_Rv).to(student_Rv.dtype)
    owned_RK, index_RK = _owned(chunk, teacher)
    return gradient_Rv.scatter_add_(1, index_RK, torch.where(owned_RK, slope.listed_KR.t(), 0.0).to(gradient_Rv.dtype))


def _owned(chunk: Chunk, teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
    """Return, ``[R, K]`` each, True for listed ids that this slice holds, and columns that are safe to index with."""
    owned_RK = (teacher.columns_RK >= 0) & (teacher.columns_RK < chunk.num_valid)
    return owned_RK, torch.where(owned_RK, teacher.columns_RK, 0)


def _is_listed(chunk: Chunk, teacher: SparseTeacher) -> Tensor:
    owned_RK, index_RK = _owned(chunk, teacher)
    hits_Rv = torch.zeros(chunk.student_Rv.shape, dtype=torch.int32, device=chunk.student_Rv.device)
    return hits_Rv.scatter_add_(1, index_RK, owned_RK.to(torch.int32)) > 0


def _is_label(chunk: Chunk) -> Tensor:
    """``[R, v]``, True at the label's entry."""
    ids_v = torch.arange(chunk.student_Rv.shape[1], device=chunk.student_Rv.device)
    return (ids_v == column(chunk.label_R)) & (ids_v < chunk.num_valid)


def _at_label(logits_Rv: Tensor, is_label_Rv: Tensor) -> Tensor:
    """``[R]``, the label's logit; 0 where another rank holds it."""
    return torch.where(is_label_Rv, logits_Rv, 0.0).sum(1)


def _masked(logits_Rv: Tensor, num_valid: int) -> Tensor:
    """Logits in the dtype of the arithmetic, with padding at -inf before any maximum is taken."""
    wide_Rv = logits_Rv.to(torch.promote_types(logits_Rv.dtype, torch.float32), copy=True)
    wide_Rv[:, num_valid:] = -math.inf
    return wide_Rv


def _weighted(weight_R: Tensor, slope_Rv: Tensor) -> Tensor:
    """weight · slope, exactly 0 where the weight is 0, whatever the slope."""
    weight_R1 = column(weight_R.to(slope_Rv.dtype))
    return torch.where(weight_R1 == 0, 0.0, weight_R1 * slope_Rv)

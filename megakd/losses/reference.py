"""The kernels in plain torch: any device, bf16 to fp64, written to be read and to check the others against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megakd.losses.divergences import DIVERGENCES, Entries, product
from megakd.losses.kernels import Chunk
from megakd.losses.vocab_parallel import RowStatistics, pivot


class ReferenceKernels:
    """See ``kernels.Kernels``. Arithmetic is fp32, or fp64 for fp64 logits."""

    def statistics(self, chunk: Chunk) -> RowStatistics:
        student_Rv = _masked(chunk.student_Rv, chunk.num_valid)
        owned_R = (chunk.label_R >= 0) & (chunk.label_R < chunk.num_valid)
        label_R1 = torch.where(owned_R, chunk.label_R, 0).unsqueeze(1)
        student_max_R = student_Rv.amax(1)
        s_Rv = student_Rv - pivot(student_max_R).unsqueeze(1)
        values = {
            "student_max": student_max_R,
            "student_sum": s_Rv.exp().sum(1),
            "label": torch.where(owned_R, student_Rv.gather(1, label_R1).squeeze(1), 0.0),
        }
        if chunk.teacher is not None:
            term = chunk.teacher.term
            teacher_Rv = _masked(chunk.teacher.logits_Rv, chunk.num_valid).to(student_Rv.dtype)
            teacher_max_R = teacher_Rv.amax(1)
            t_Rv = (teacher_Rv - pivot(teacher_max_R).unsqueeze(1)) / term.temperature
            s_Rv = s_Rv / term.student_temperature
            exp_s_Rv, exp_t_Rv = s_Rv.exp(), t_Rv.exp()
            tops_Rv = (student_Rv == student_max_R.unsqueeze(1)) & (teacher_Rv == teacher_max_R.unsqueeze(1))
            values |= {
                "student_kd_sum": exp_s_Rv.sum(1),
                "teacher_max": teacher_max_R,
                "teacher_sum": exp_t_Rv.sum(1),
                "teacher_self": product(exp_t_Rv, t_Rv).sum(1),
                "agree": tops_Rv[:, : chunk.num_valid].any(1).to(student_Rv.dtype),
            }
            if "forward" in chunk.columns:
                values["forward"] = product(exp_t_Rv, t_Rv - s_Rv).sum(1)
            if "reverse" in chunk.columns:
                values["reverse"] = product(exp_s_Rv, s_Rv - t_Rv).sum(1)
        return RowStatistics(chunk.columns, torch.stack([values[name] for name in chunk.columns]))

    def gradient(self, chunk: Chunk, rows: RowStatistics) -> Tensor:
        s_Rv = _masked(chunk.student_Rv, chunk.num_valid) - pivot(rows["student_max"]).unsqueeze(1)
        ids_v = torch.arange(s_Rv.shape[1], device=s_Rv.device)
        one_hot_Rv = (ids_v == chunk.label_R.unsqueeze(1)) & (ids_v < chunk.num_valid)
        gradient_Rv = _weighted(
            chunk.lm_weight_R, s_Rv.exp() / rows["student_sum"].unsqueeze(1) - one_hot_Rv.to(s_Rv.dtype)
        )
        if chunk.teacher is not None:
            term = chunk.teacher.term
            teacher_Rv = _masked(chunk.teacher.logits_Rv, chunk.num_valid).to(s_Rv.dtype)
            t_Rv = (teacher_Rv - pivot(rows["teacher_max"]).unsqueeze(1)) / term.temperature
            s_Rv = s_Rv / term.student_temperature
            entries = Entries(
                s_Rv=s_Rv,
                t_Rv=t_Rv,
                p_Rv=t_Rv.exp() / rows["teacher_sum"].unsqueeze(1),
                q_Rv=s_Rv.exp() / rows["student_kd_sum"].unsqueeze(1),
            )
            slope_Rv = DIVERGENCES[term.divergence].gradient(entries, rows)
            gradient_Rv += _weighted(chunk.teacher.weight_R, slope_Rv * (term.scale / term.student_temperature))
        gradient_Rv[:, chunk.num_valid :] = 0.0  # also where the row is NaN
        return gradient_Rv.to(chunk.student_Rv.dtype)

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        rows = self.statistics(chunk)
        return rows, self.gradient(chunk, rows)


def _masked(logits_Rv: Tensor, num_valid: int) -> Tensor:
    """Logits in the dtype of the arithmetic, with padding at -inf before any maximum is taken."""
    wide_Rv = logits_Rv.to(torch.promote_types(logits_Rv.dtype, torch.float32), copy=True)
    wide_Rv[:, num_valid:] = -math.inf
    return wide_Rv


def _weighted(weight_R: Tensor, slope_Rv: Tensor) -> Tensor:
    """weight · slope where a weight of 0 gives exactly 0, whatever the slope."""
    weight_R1 = weight_R.to(slope_Rv.dtype).unsqueeze(1)
    return torch.where(weight_R1 == 0, 0.0, weight_R1 * slope_Rv)

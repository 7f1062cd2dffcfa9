"""The kernels in C++ for CPUs, in bf16 and fp32: threaded, a row at a time while it is in cache, gradient in place."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd import _csrc
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, SparseSlope, SparseTeacher
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics

DTYPES = (torch.float32, torch.bfloat16)

_SAME_SUMS = {"soft_cross_entropy": "forward_kl"}
"""Formulas with the sums and gradient of another one; divergences.py makes their value from the sums."""

_PARAMETERS = {
    "symmetric_kl": ("reverse_weight",),
    "generalised_jsd": ("jsd_beta",),
    "skew_forward_kl": ("skew_alpha",),
    "skew_reverse_kl": ("skew_alpha",),
    "alpha_beta": ("ab_alpha", "ab_beta"),
    "decoupled": ("dkd_alpha", "dkd_beta"),
}
"""Fields of a term that are the parameters of its kernel, in order."""


class NativeKernels:
    """``protocol.Kernels`` in C++. Arithmetic is fp32; as many threads as torch uses.

    The logits of student and teacher must be contiguous and fp32 or bf16; their dtypes may differ.
    """

    def supports(self, chunk: Chunk) -> bool:
        logits = [chunk.student_Rv]
        if isinstance(chunk.teacher, DenseTeacher):
            logits.append(chunk.teacher.logits_Rv)
        return all(x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous() for x in logits)

    def statistics(self, chunk: Chunk) -> RowStatistics:
        lines = len(chunk.columns)
        if isinstance(chunk.teacher, SparseTeacher):
            lines += chunk.teacher.columns_RK.shape[1]
        rows = RowStatistics(chunk.columns, _empty(lines, chunk))
        _sweep("statistics", chunk, rows.values_kR)
        return rows

    def second_pass(self, chunk: Chunk, rows: RowStatistics) -> RowStatistics:
        columns = _second_pass_columns(chunk)
        values_kR = torch.cat([rows.values_kR, _empty(len(columns), chunk)])
        _sweep("second_pass", chunk, values_kR)
        return RowStatistics(columns, values_kR[-len(columns) :])

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        _sweep("gradient", chunk, rows.values_kR, slope)
        return chunk.student_Rv

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        columns = chunk.columns + _second_pass_columns(chunk)
        rows = RowStatistics(columns, _empty(len(columns), chunk))
        _sweep("both", chunk, rows.values_kR)
        return rows, chunk.student_Rv


def _second_pass_columns(chunk: Chunk) -> tuple[str, ...]:
    return DIVERGENCES[chunk.teacher.term.formula].second_pass if isinstance(chunk.teacher, DenseTeacher) else ()


def _empty(lines: int, chunk: Chunk) -> Tensor:
    return torch.empty(lines, chunk.student_Rv.shape[0])


def _sweep(sweep: Any, chunk: Chunk, statistics_kR: Tensor, slope: SparseSlope | None = None) -> None:
    """Run the sweep of this name (see ``_csrc.pyi``) with the chunk's teacher, if any."""
    arguments: tuple[Any, ...] = (
        sweep,
        _array(chunk.student_Rv),
        chunk.num_valid,
        _array(chunk.label_R.contiguous()),
        _floats(chunk.lm_weight_R),
        None if chunk.z_weight_R is None else _floats(chunk.z_weight_R),
        _array(statistics_kR.contiguous()),
        torch.get_num_threads(),
    )
    teacher = chunk.teacher
    if teacher is None:
        _csrc.sweep_lm(*arguments)
    elif isinstance(teacher, SparseTeacher):
        _csrc.sweep_sparse(
            *arguments,
            columns=_array(teacher.columns_RK.contiguous()),
            student_temperature=teacher.term.student_temperature,
            spread=teacher.term.tail == "spread",
            factor=None if slope is None else _floats(slope.factor_R),
            shift=None if slope is None else _floats(slope.shift_R),
            listed=None if slope is None else _floats(slope.listed_KR),
        )
    else:
        term = teacher.term
        _csrc.sweep_dense(
            *arguments,
            teacher=_array(teacher.logits_Rv),
            kd_weight=_floats(teacher.weight_R),
            divergence=_SAME_SUMS.get(term.formula, term.formula),
            parameters=_parameters(term),
            student_temperature=term.student_temperature,
            teacher_temperature=term.temperature,
            kd_scale=term.scale,
        )


def _parameters(term: KDTerm) -> tuple[float, float]:
    first, second, *_ = *(getattr(term, name) for name in _PARAMETERS.get(term.formula, ())), 0.0, 0.0
    return first, second


def _floats(values: Tensor) -> NDArray[Any]:
    return _array(values.float().contiguous())


def _array(tensor: Tensor) -> NDArray[Any]:
    """View the tensor's memory as a numpy array; bf16, which numpy lacks, as uint16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array

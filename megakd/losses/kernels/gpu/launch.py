"""The kernels in Triton for GPUs: bf16, fp16 and fp32 logits, fp32 arithmetic, the gradient in place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, SparseSlope, SparseTeacher
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics

_SEARCH_BLOCK = 1024  # columns at a time where each is compared with every digit
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Formula:
    """A divergence and its numbers, as the device functions of ``formulas.py`` take them.

    slope: the FORMULA of the second pass and of the gradient. sums: the SUMS of ``dense_statistics``. x, y: the
    divergence's own numbers. log_on_p, log_on_q: logarithms of the weights of p and q in a mixture.
    """

    slope: str
    sums: str = "none"
    x: float = 0.0
    y: float = 0.0
    log_on_p: float = 0.0
    log_on_q: float = 0.0

    @property
    def numbers(self) -> tuple[float, ...]:
        """The four numbers as floats; for an int Triton would compile another kernel."""
        return float(self.x), float(self.y), self.log_on_p, self.log_on_q

    @staticmethod
    def of(term: KDTerm) -> Formula:
        name = term.formula
        match name:
            case "forward_kl" | "soft_cross_entropy":
                return Formula("forward_kl", "forward")
            case "reverse_kl":
                return Formula(name, "reverse")
            case "symmetric_kl":
                return Formula("mixed_kl", "both", term.reverse_weight)
            case "adaptive_kl":
                return Formula(name, "both")
            case "logit_mse":
                return Formula(name, "square")
            case "centred_logit_mse":
                return Formula(name, "difference")
            case "decoupled":
                return Formula(name, "forward", term.dkd_alpha, term.dkd_beta)
            case "generalised_jsd":
                return _mixture(name, term.jsd_beta, on_p=term.jsd_beta)
            case "skew_forward_kl":
                return _mixture(name, term.skew_alpha, on_p=term.skew_alpha)
            case "skew_reverse_kl":
                return _mixture(name, term.skew_alpha, on_p=1 - term.skew_alpha)
            case "alpha_beta":
                return Formula(_alpha_beta_case(term), x=term.ab_alpha, y=term.ab_beta)
            case _:
                return Formula(name)


def _mixture(name: str, x: float, *, on_p: float) -> Formula:
    return Formula(name, x=x, log_on_p=math.log(on_p), log_on_q=math.log1p(-on_p))


def _alpha_beta_case(term: KDTerm) -> str:
    a, b = term.ab_alpha, term.ab_beta
    if a == 0:
        return "alpha_beta_0_0" if b == 0 else "alpha_beta_0_b"
    if b == 0:
        return "alpha_beta_a_0"
    return "alpha_beta_opposite" if a + b == 0 else "alpha_beta"


class TritonKernels:
    """``protocol.Kernels`` in Triton. On CPU with Triton's interpreter alone (``TRITON_INTERPRET=1``), for tests.

    block: columns that a program takes at a time, a power of 2 and at least 32. num_warps: warps that share them.
    """

    def __init__(self, block: int = 4096, num_warps: int = 16) -> None:
        self._block, self._num_warps = block, num_warps

    def supports(self, chunk: Chunk) -> bool:
        tensors = [chunk.student_Rv]
        if isinstance(chunk.teacher, DenseTeacher):
            tensors.append(chunk.teacher.logits_Rv)
        if chunk.student_Rv.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return False
        return _is_installed() and all(x.dtype in DTYPES and x.stride(1) == 1 for x in tensors)

    def statistics(self, chunk: Chunk) -> RowStatistics:
        student_Rv, teacher = chunk.student_Rv, chunk.teacher
        num_rows, width = student_Rv.shape
        num_lines = len(chunk.columns) + (teacher.columns_RK.shape[1] if isinstance(teacher, SparseTeacher) else 0)
        values_kR = _new(student_Rv, num_lines, num_rows)
        sizes = (num_rows, chunk.num_valid, width)
        if isinstance(teacher, DenseTeacher):
            formula, tau_s, tau_t = _settings(teacher)
            self._launch(
                "dense_statistics",
                chunk,
                *(student_Rv, teacher.logits_Rv, chunk.label_R.contiguous(), values_kR, *sizes),
                *(student_Rv.stride(0), teacher.logits_Rv.stride(0), 1 / tau_s, 1 / tau_t),
                SUMS=formula.sums,
                LABEL_APART=formula.slope == "decoupled",
                TEMPERED=tau_s != 1,
                BLOCK=self._block,
            )
            return RowStatistics(chunk.columns, values_kR)
        label_R = chunk.label_R.contiguous()
        columns_RK, hits_Rw, term = label_R, label_R, KDTerm()  # stand-ins where nothing is listed
        num_listed, num_words = 0, 0
        if isinstance(teacher, SparseTeacher):
            columns_RK, term, num_listed = teacher.columns_RK.contiguous(), teacher.term, teacher.columns_RK.shape[1]
            num_words = -(-width // 32)
            hits_Rw = torch.zeros(num_rows, num_words, dtype=torch.int32, device=student_Rv.device)
            arguments = (columns_RK, hits_Rw, num_listed, chunk.num_valid, num_words)
            self._launch("mark_listed", chunk, *arguments, K_BLOCK=_power_of_2(num_listed))
        tau = term.student_temperature
        self._launch(
            "student_statistics",
            chunk,
            *(student_Rv, label_R, columns_RK, hits_Rw, values_kR, *sizes, student_Rv.stride(0)),
            *(num_listed, num_words, 1 / tau),
            SPARSE=isinstance(teacher, SparseTeacher),
            SPREAD="total" in chunk.columns,
            TEMPERED=tau != 1,
            BLOCK=self._block,
            K_BLOCK=_power_of_2(num_listed),
        )
        return RowStatistics(chunk.columns, values_kR)

    def second_pass(self, chunk: Chunk, rows: RowStatistics) -> RowStatistics:
        student_Rv, teacher = chunk.student_Rv, chunk.teacher
        assert isinstance(teacher, DenseTeacher)
        formula, tau_s, tau_t = _settings(teacher)
        columns = DIVERGENCES[teacher.term.formula].second_pass
        values_kR = _new(student_Rv, len(columns), student_Rv.shape[0])
        self._launch(
            "dense_second_pass",
            chunk,
            *(student_Rv, teacher.logits_Rv, _lines(chunk, rows), values_kR),
            *(student_Rv.shape[0], chunk.num_valid, student_Rv.shape[1]),
            *(student_Rv.stride(0), teacher.logits_Rv.stride(0), 1 / tau_s, 1 / tau_t),
            *formula.numbers,
            FORMULA=formula.slope,
            BLOCK=self._block,
        )
        return RowStatistics(columns, values_kR)

    digit_bits = 4  # a program compares each id with 16 digits: more would fill its registers

    def digit_mass(self, chunk: Chunk, rows: RowStatistics, prefix_R: Tensor, *, shift: int) -> Tensor:
        """Return ``[R, 16]`` as `adaptive_kl.HeadSearch` says."""
        teacher = chunk.teacher
        assert isinstance(teacher, DenseTeacher)
        mass_Rb = _new(chunk.student_Rv, chunk.student_Rv.shape[0], 1 << self.digit_bits)
        self._launch(
            "digit_mass",
            chunk,
            *(teacher.logits_Rv, _lines(chunk, rows), prefix_R, mass_Rb),
            *(chunk.student_Rv.shape[0], chunk.num_valid, chunk.student_Rv.shape[1], teacher.logits_Rv.stride(0)),
            *(1 / teacher.term.temperature, shift),
            BITS=self.digit_bits,
            BLOCK=min(self._block, _SEARCH_BLOCK),
        )
        return mass_Rb

    def gaps(self, chunk: Chunk, rows: RowStatistics, outside_R: Tensor) -> Tensor:
        """Return ``[2, R]`` as `adaptive_kl.HeadSearch` says."""
        student_Rv, teacher = chunk.student_Rv, chunk.teacher
        assert isinstance(teacher, DenseTeacher)
        _, tau_s, tau_t = _settings(teacher)
        gaps_2R = _new(student_Rv, 2, student_Rv.shape[0])
        self._launch(
            "head_and_tail_gaps",
            chunk,
            *(student_Rv, teacher.logits_Rv, _lines(chunk, rows), outside_R, gaps_2R),
            *(student_Rv.shape[0], chunk.num_valid, student_Rv.shape[1]),
            *(student_Rv.stride(0), teacher.logits_Rv.stride(0), 1 / tau_s, 1 / tau_t),
            BLOCK=self._block,
        )
        return gaps_2R

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        student_Rv, teacher = chunk.student_Rv, chunk.teacher
        values_kR, label_R = _lines(chunk, rows), chunk.label_R.contiguous()
        lm_weight_R = chunk.lm_weight_R.float().contiguous()
        z_weight_R = lm_weight_R if chunk.z_weight_R is None else chunk.z_weight_R.float().contiguous()
        has_z = chunk.z_weight_R is not None
        sizes = (student_Rv.shape[0], chunk.num_valid, student_Rv.shape[1])
        if isinstance(teacher, DenseTeacher):
            formula, tau_s, tau_t = _settings(teacher)
            self._launch(
                "dense_gradient",
                chunk,
                *(student_Rv, teacher.logits_Rv, values_kR, label_R, lm_weight_R, z_weight_R),
                *(teacher.weight_R.float().contiguous(), *sizes),
                *(student_Rv.stride(0), teacher.logits_Rv.stride(0), 1 / tau_s, 1 / tau_t),
                *(teacher.term.scale / tau_s, *formula.numbers),
                FORMULA=formula.slope,
                TEMPERED=tau_s != 1,
                HAS_Z=has_z,
                BLOCK=self._block,
            )
            return student_Rv
        factor_R = shift_R = lm_weight_R  # stand-ins where nothing is listed
        tau = 1.0
        if isinstance(teacher, SparseTeacher):
            assert slope is not None
            factor_R, shift_R = slope.factor_R.contiguous(), slope.shift_R.contiguous()
            tau = teacher.term.student_temperature
        self._launch(
            "student_gradient",
            chunk,
            *(student_Rv, values_kR, label_R, lm_weight_R, z_weight_R, factor_R, shift_R, *sizes),
            *(student_Rv.stride(0), 1 / tau),
            SPARSE=isinstance(teacher, SparseTeacher),
            HAS_Z=has_z,
            BLOCK=self._block,
        )
        if isinstance(teacher, SparseTeacher) and slope is not None:
            listed_KR, num_listed = slope.listed_KR.contiguous(), teacher.columns_RK.shape[1]
            self._launch(
                "sparse_gradient",
                chunk,
                *(student_Rv, teacher.columns_RK.contiguous(), values_kR, rows.listed_KR.contiguous(), listed_KR),
                *(label_R, lm_weight_R, z_weight_R, *sizes[:2], student_Rv.stride(0), num_listed),
                HAS_Z=has_z,
                K_BLOCK=_power_of_2(num_listed),
            )
        return student_Rv

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        rows = self.statistics(chunk)
        if isinstance(chunk.teacher, DenseTeacher) and DIVERGENCES[chunk.teacher.term.formula].second_pass:
            rows = rows.extended(self.second_pass(chunk, rows))
        return rows, self.gradient(chunk, rows)

    def _launch(self, kernel: str, chunk: Chunk, *arguments: Tensor | int | float, **constants: int | str) -> None:
        """Launch a kernel with one program for each row, on the device of the logits."""
        if chunk.student_Rv.shape[0] == 0:
            return
        num_warps = self._num_warps if "BLOCK" in constants else 4
        with torch.cuda.device_of(chunk.student_Rv):  # type: ignore[no-untyped-call]
            _compiled()[kernel][(chunk.student_Rv.shape[0],)](*arguments, **constants, num_warps=num_warps)


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _compiled() -> dict[str, Any]:
    """The kernels by name, imported here so that triton need not be installed unless they are used."""
    from megakd.losses.kernels.gpu import gradients as triton_gradients
    from megakd.losses.kernels.gpu import head_search as triton_head_search
    from megakd.losses.kernels.gpu import statistics as triton_statistics

    return {**vars(triton_statistics), **vars(triton_gradients), **vars(triton_head_search)}


def _settings(teacher: DenseTeacher) -> tuple[Formula, float, float]:
    """The formula, the student's temperature and the teacher's temperature."""
    return Formula.of(teacher.term), teacher.term.student_temperature, teacher.term.temperature


def _lines(chunk: Chunk, rows: RowStatistics) -> Tensor:
    """The statistics of a chunk's rows, contiguous, in the order in which the device functions expect them."""
    assert rows.columns[: len(chunk.columns)] == chunk.columns
    return rows.values_kR.contiguous()


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _power_of_2(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()

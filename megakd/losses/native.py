"""The kernels in C++ for CPU: one pass over a chunk's logits, threads, the gradient in place; bf16 and fp32."""

from __future__ import annotations

from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd import _csrc
from megakd.losses.kernels import Chunk, KDTerm
from megakd.losses.vocab_parallel import RowStatistics

DTYPES = (torch.float32, torch.bfloat16)

FORMULAS = {"forward_kl": "forward_kl", "soft_cross_entropy": "forward_kl", "reverse_kl": "reverse_kl"}
"""The native formula of a divergence's sums and gradient; its value is made from the sums, in divergences.py."""


class NativeKernels:
    """See ``kernels.Kernels``. Arithmetic is fp32; as many threads as torch uses."""

    def statistics(self, chunk: Chunk) -> RowStatistics:
        values_kR = chunk.student_Rv.new_empty(len(chunk.columns), chunk.student_Rv.shape[0], dtype=torch.float32)
        _sweep("statistics", chunk, values_kR)
        return RowStatistics(chunk.columns, values_kR)

    def gradient(self, chunk: Chunk, rows: RowStatistics) -> Tensor:
        _sweep("gradient", chunk, rows.values_kR)
        return chunk.student_Rv

    def statistics_and_gradient(self, chunk: Chunk) -> tuple[RowStatistics, Tensor]:
        values_kR = chunk.student_Rv.new_empty(len(chunk.columns), chunk.student_Rv.shape[0], dtype=torch.float32)
        _sweep("both", chunk, values_kR)
        return RowStatistics(chunk.columns, values_kR), chunk.student_Rv


def _sweep(sweep: Literal["statistics", "gradient", "both"], chunk: Chunk, statistics_kR: Tensor) -> None:
    teacher = chunk.teacher
    term = KDTerm() if teacher is None else teacher.term
    _csrc.head_sweep(
        sweep,
        _array(chunk.student_Rv),
        None if teacher is None else _array(teacher.logits_Rv),
        chunk.num_valid,
        _array(chunk.label_R.contiguous()),
        _array(chunk.lm_weight_R.float().contiguous()),
        None if teacher is None else _array(teacher.weight_R.float().contiguous()),
        FORMULAS[term.divergence],
        term.student_temperature,
        term.temperature,
        term.scale,
        _array(statistics_kR),
        torch.get_num_threads(),
    )


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as a numpy array; numpy has no bf16, so that travels as its bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array

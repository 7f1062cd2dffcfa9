"""Sources of a sweep's logits, chunk by chunk, and takers of their gradient.

Axes: ``R`` rows (the tokens that are computed), ``H`` hidden, ``v`` this rank's slice of the vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_PRODUCT_BLOCK_BYTES = 4 << 20


class Logits(Protocol):
    """Logits of rows, made or looked up a chunk at a time. width: columns v of the slice."""

    width: int
    dtype: torch.dtype

    def buffer(self, num_rows: int) -> Tensor | None:
        """Allocate memory for the logits of a chunk of at most ``num_rows`` rows; None if none is needed."""

    def logits(self, rows: slice, buffer: Tensor | None) -> Tensor:
        """Return the logits ``[R, v]`` of these rows, in the buffer if there is one."""


class StudentLogits(Logits, Protocol):
    """The student's logits, which the sweep may overwrite, and a taker of their gradient."""

    num_rows: int
    wants_gradient: bool

    def take(self, rows: slice, gradient_Rv: Tensor) -> None:
        """Receive the gradient by these rows' logits."""


class ProductLogits:
    """Hidden states ``[R, H]`` times the transpose of output weights ``[v, H]``."""

    def __init__(self, hidden_RH: Tensor, weight_vH: Tensor) -> None:
        self.hidden_RH, self.weight_vH = hidden_RH, weight_vH
        self.num_rows, self.width, self.dtype = hidden_RH.shape[0], weight_vH.shape[0], hidden_RH.dtype

    def buffer(self, num_rows: int) -> Tensor | None:
        return self.hidden_RH.new_empty(num_rows, self.width)

    def logits(self, rows: slice, buffer: Tensor | None) -> Tensor:
        assert buffer is not None
        hidden_RH = self.hidden_RH[rows]
        return torch.mm(hidden_RH, self.weight_vH.t(), out=buffer[: hidden_RH.shape[0]])


class HeadStudent(ProductLogits):
    """The student's output head, which turns the gradient of its logits into that of its inputs.

    d_hidden_RH: after the sweep, this rank's part of the gradient by the hidden states, in their dtype.
    d_weight_vH: after the sweep, the gradient by the weight; fp32 for a bf16 weight. sum_vH: a tensor of that dtype to
    which the gradient by the weight is added instead.
    """

    def __init__(
        self,
        hidden_RH: Tensor,
        weight_vH: Tensor,
        *,
        wants_hidden: bool,
        wants_weight: bool,
        sum_vH: Tensor | None = None,
    ) -> None:
        super().__init__(hidden_RH, weight_vH)
        self.wants_gradient = wants_hidden or wants_weight
        self.d_hidden_RH = torch.empty_like(hidden_RH) if wants_hidden else None
        wide = torch.promote_types(weight_vH.dtype, torch.float32)
        own_sum = wants_weight and sum_vH is None
        self.d_weight_vH = torch.zeros_like(weight_vH, dtype=wide) if own_sum else None
        self._sum_vH = sum_vH if wants_weight and sum_vH is not None else self.d_weight_vH

    def take(self, rows: slice, gradient_Rv: Tensor) -> None:
        if self.d_hidden_RH is not None:
            torch.mm(gradient_Rv, self.weight_vH, out=self.d_hidden_RH[rows])
        if self._sum_vH is not None:
            _add_product_inplace(self._sum_vH, gradient_Rv, self.hidden_RH[rows])


class GivenLogits:
    """Logits ``[T, v]`` that exist. rows_R: the tokens that are computed, None for all.

    Chunks are views, or copies where tokens are left out or the memory has gaps (a slice of columns).
    """

    def __init__(self, logits_Tv: Tensor, rows_R: Tensor | None) -> None:
        self.logits_Tv, self.rows_R = logits_Tv, rows_R
        self.copies = rows_R is not None or not logits_Tv.is_contiguous()
        self.num_rows = logits_Tv.shape[0] if rows_R is None else rows_R.shape[0]
        self.width, self.dtype = logits_Tv.shape[1], logits_Tv.dtype

    def buffer(self, num_rows: int) -> Tensor | None:
        return self.logits_Tv.new_empty(num_rows, self.width) if self.copies else None

    def logits(self, rows: slice, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            return self.logits_Tv[rows]
        if self.rows_R is None:
            logits_Rv = self.logits_Tv[rows]
            return buffer[: logits_Rv.shape[0]].copy_(logits_Rv)
        index_R = self.rows_R[rows]
        return torch.index_select(self.logits_Tv, 0, index_R, out=buffer[: index_R.shape[0]])


class GivenStudent(GivenLogits):
    """The student's logits, which are overwritten with their gradient if one is wanted."""

    def __init__(self, logits_Tv: Tensor, rows_R: Tensor | None, *, wants_gradient: bool) -> None:
        super().__init__(logits_Tv, rows_R)
        self.wants_gradient = wants_gradient

    def take(self, rows: slice, gradient_Rv: Tensor) -> None:
        if self.rows_R is not None:
            self.logits_Tv.index_copy_(0, self.rows_R[rows], gradient_Rv)
        elif gradient_Rv.data_ptr() != self.logits_Tv[rows].data_ptr():
            self.logits_Tv[rows] = gradient_Rv


def _add_product_inplace(sum_vH: Tensor, gradient_Rv: Tensor, hidden_RH: Tensor) -> None:
    """sum += gradientᵀ · hidden, accumulated over chunks in the dtype of the sum."""
    if sum_vH.dtype == gradient_Rv.dtype:
        sum_vH.addmm_(gradient_Rv.t(), hidden_RH)
    else:
        _ADD_WIDER.get(sum_vH.device.type, _add_blocks_inplace)(sum_vH, gradient_Rv, hidden_RH)


def _add_blocks_inplace(sum_vH: Tensor, gradient_Rv: Tensor, hidden_RH: Tensor) -> None:
    """sum += gradientᵀ · hidden by products in the narrow dtype, which torch's CPU matmul makes of such inputs.

    Each goes through a block that stays in the cache: only the wide sum costs memory traffic.
    """
    block = max(1, _PRODUCT_BLOCK_BYTES // (hidden_RH.shape[1] * hidden_RH.element_size()))
    for start in range(0, sum_vH.shape[0], block):
        sum_vH[start : start + block] += torch.mm(gradient_Rv[:, start : start + block].t(), hidden_RH)


def _add_whole_inplace(sum_vH: Tensor, gradient_Rv: Tensor, hidden_RH: Tensor) -> None:
    """sum += gradientᵀ · hidden in one product that is accumulated in the sum's dtype and never rounded to another."""
    torch.addmm(sum_vH, gradient_Rv.t(), hidden_RH, out_dtype=sum_vH.dtype, out=sum_vH)


_ADD_WIDER = {"cpu": _add_blocks_inplace, "cuda": _add_whole_inplace}
"""Additions of a product to a sum of a wider dtype, by the device that has them."""

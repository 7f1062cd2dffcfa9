"""Rows of a logits store from a model's hidden states, for teachers that are captured and models in training.

Axes: ``S`` sequence, ``B`` microbatch, ``T`` = S x B tokens, sequence first, ``K`` best ids, ``N`` draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megakd.logits.codec import Rows
from megakd.logits.rounding import RandomRounding
from megakd.logits.sparsify import (
    renormalised_samples,
    sampled_counts,
    top_p_k,
    uniform_numbers,
    weighted_samples,
)
from megakd.logits.spec import StoreSpec
from megakd.losses.kernels.choose import Implementation
from megakd.losses.read import HeadReading, read_head
from megakd.losses.vocab_parallel import VocabShard


class RowReader:
    """Reader of an output head, of which this rank has a slice, for the rows of a store of ``spec``."""

    def __init__(self, spec: StoreSpec, *, shard: VocabShard, implementation: Implementation, chunk_bytes: int) -> None:
        self._spec, self._shard = spec, shard
        self._implementation, self._chunk_bytes = implementation, chunk_bytes

    @property
    def draws(self) -> bool:
        """True if `read` needs uniform numbers that decide draws."""
        return self._spec.kind != "top_p_k"

    def read(
        self, hidden_TH: Tensor, weight_vH: Tensor, *, uniforms_TN: Tensor | None = None, ids_T: Tensor | None = None
    ) -> HeadReading:
        """Read the head for `rows`, and the log-probabilities of ``ids_T``. All ranks of the tensor group call it."""
        return read_head(
            hidden_TH,
            weight_vH,
            shard=self._shard,
            ids_T=ids_T,
            entropy=True,
            top_k=self._spec.top_k,
            uniforms_TN=uniforms_TN,
            proposal_exponent=self._spec.proposal_exponent,
            implementation=self._implementation,
            chunk_bytes=self._chunk_bytes,
        )

    def rows(self, reading: HeadReading, positions_T: NDArray[np.int64] | None = None) -> Rows:
        """Make the rows of all positions. positions_T: their token positions in the dataset, for weighted draws."""
        assert reading.entropy_T is not None
        if self._spec.kind == "top_p_k":
            assert reading.top_ids_TK is not None and reading.top_log_probs_TK is not None
            return top_p_k(reading.top_ids_TK, reading.top_log_probs_TK, reading.entropy_T, top_p=self._spec.top_p)
        assert reading.drawn_ids_TN is not None and reading.drawn_log_probs_TN is not None
        if self._spec.row_format.weighted:
            assert reading.drawn_log_proposal_TN is not None
            assert positions_T is not None
            drawn = reading.drawn_ids_TN, reading.drawn_log_probs_TN, reading.drawn_log_proposal_TN
            spec = self._spec
            rounding = RandomRounding(positions_T, spec.value_bits, spec.seed, spec.parents["dataset"])
            return weighted_samples(*drawn, reading.entropy_T, rounding=rounding)
        if self._spec.kind == "samples":
            return sampled_counts(reading.drawn_ids_TN, reading.entropy_T)
        return renormalised_samples(reading.drawn_ids_TN, reading.drawn_log_probs_TN, reading.entropy_T)


def draw_numbers(starts_B: NDArray[np.int64], width: int, spec: StoreSpec) -> NDArray[np.float64]:
    """Uniform numbers, float64 ``[S, B, N]``, that decide the draws of ``width`` positions from ``starts_B`` on.

    A function of seed, dataset and token position, so the same in every layout.
    """
    positions_T = token_positions(starts_B, width)
    numbers_TN = uniform_numbers(positions_T, spec.draws, seed=spec.seed, dataset=spec.parents["dataset"])
    return numbers_TN.reshape(width, len(starts_B), spec.draws)


def token_positions(starts_B: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Token positions ``[T]`` of ``width`` positions from ``starts_B`` on, sequence first."""
    positions_SB: NDArray[np.int64] = starts_B + np.arange(width)[:, None]
    return positions_SB.reshape(-1)


def finite_samples(reading: HeadReading, batch: int) -> NDArray[np.bool_]:
    """Return bool ``[B]``, True for samples whose logits are all finite."""
    assert reading.entropy_T is not None
    good_T = torch.isfinite(reading.entropy_T) & torch.isfinite(reading.log_z_T)
    good_B: NDArray[np.bool_] = good_T.view(-1, batch).all(0).cpu().numpy()
    return good_B


def split_samples(rows: Rows, num_rows_B: NDArray[np.int64]) -> Iterator[Rows]:
    """Yield the rows of each sample, as many as it has labels, from those of all positions."""
    batch = len(num_rows_B)
    for column, num_rows in enumerate(num_rows_B.tolist()):
        positions = slice(column, num_rows * batch, batch)  # of one sample; rows are sequence first
        yield Rows(rows.ids_TK[positions], rows.log_probs_TK[positions], rows.entropy_T[positions])

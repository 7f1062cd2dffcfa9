"""Sparse targets against the sharded student: a row becomes its listed ids and one bucket for all the others.

Axes: ``R`` rows, ``K`` listed ids (one more where the tail goes onto the label), ``V`` the vocabulary.

Every divergence that is a sum over ids is, on such targets, a sum over the K + 1 buckets, made with the same formulas
of one entry as for whole rows. The ids' logits are on every rank after the one all-gather, so this small part of the
work is done everywhere alike, in float64; only the walk over the vocabulary is split. Derivations:
``docs/numerics.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.divergences import column
from megakd.losses.kernels.protocol import SparseSlope
from megakd.losses.pointwise import POINTWISE, Entries, product
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics
from megakd.targets import SparseTargets

_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Buckets:
    """Sparse targets of rows, with the tail settled.

    ids_RK: -1 in empty slots. log_p_RK: float64, -inf in empty slots, NaN for what is no id of the vocabulary.
    log_tail_R: float64, log-mass of all ids that are not listed, together. num_rest_R: how many those are. is_top_RK:
    bool, the ids to which the targets give most, before the tail goes anywhere.
    """

    ids_RK: Tensor
    log_p_RK: Tensor
    log_tail_R: Tensor
    num_rest_R: Tensor
    is_top_RK: Tensor

    @staticmethod
    def of(targets: SparseTargets, labels_R: Tensor, term: KDTerm, vocab_size: int) -> Buckets:
        """From the targets of the rows and their labels."""
        log_p_RK = targets.log_probs_TK.double()
        empty_RK = log_p_RK == -math.inf
        ids_RK = torch.where(empty_RK, -1, targets.ids_TK.long())
        is_id_RK = empty_RK | ((ids_RK >= 0) & (ids_RK < vocab_size))
        log_p_RK = torch.where(is_id_RK, log_p_RK, math.nan)
        is_top_RK = ~empty_RK & (log_p_RK == column(log_p_RK.amax(1)))
        num_rest_R = vocab_size - (ids_RK >= 0).sum(1)
        log_tail_R = torch.full_like(log_p_RK[:, 0], -math.inf)
        if term.tail == "renormalise":
            log_p_RK = torch.where(empty_RK, -math.inf, (log_p_RK / term.temperature).log_softmax(1))
        elif term.tail != "none":
            # Less than the rounding of log-probabilities is unknown, and 0 would make some divergences infinite.
            least = _ROUNDING if term.tail == "ghost" else 0.0
            tail_R = (1 - log_p_RK.exp().sum(1)).clamp(min=least)
            log_tail_R = torch.where(num_rest_R == 0, 0.0, tail_R).log()
        if term.tail == "label":
            ids_RK, log_p_RK = _onto_label(ids_RK, log_p_RK, labels_R, log_tail_R)
            log_tail_R = torch.full_like(log_tail_R, -math.inf)
            is_top_RK = torch.nn.functional.pad(is_top_RK, (0, 1))
        return Buckets(ids_RK, log_p_RK, log_tail_R, num_rest_R, is_top_RK)

    def __getitem__(self, rows: slice) -> Buckets:
        return Buckets(*(values[rows] for values in vars(self).values()))


def _onto_label(ids_RK: Tensor, log_p_RK: Tensor, labels_R: Tensor, log_mass_R: Tensor) -> tuple[Tensor, Tensor]:
    """Give a mass to the label: to its slot where it is listed, else in a slot of its own."""
    is_label_RK = ids_RK == column(labels_R)
    listed_R = is_label_RK.any(1)
    log_p_RK = torch.where(is_label_RK, torch.logaddexp(log_p_RK, column(log_mass_R).expand_as(log_p_RK)), log_p_RK)
    own_R = ~listed_R & (log_mass_R > -math.inf)
    extra_id_R1 = column(torch.where(own_R, labels_R, -1))
    extra_log_p_R1 = column(torch.where(own_R, log_mass_R, -math.inf))
    return torch.cat([ids_RK, extra_id_R1], 1), torch.cat([log_p_RK, extra_log_p_R1], 1)


@dataclass(frozen=True)
class SparseValues:
    """value_R: the divergence. agree_R: bool, the student's top-1 is the teacher's. slope: its weighted gradient."""

    value_R: Tensor
    agree_R: Tensor
    slope: SparseSlope


def sparse_values(rows: RowStatistics, buckets: Buckets, term: KDTerm, weight_R: Tensor) -> SparseValues:
    """The divergence and its gradient from merged statistics. ``weight_R``: what each row's divergence weighs."""
    tau, empty_RK = term.student_temperature, buckets.ids_RK < 0
    listed_RK = torch.where(empty_RK, -math.inf, rows.listed_KR.t().double())
    # log-probabilities of the student, relative to nothing that could overflow
    top_R = torch.maximum(listed_RK.amax(1), rows["rest_max"].double())
    top_R = torch.where(top_R == -math.inf, 0.0, top_R)
    to_rest_R = (rows["rest_max"].double() - top_R) / tau  # -inf where there is no rest
    log_rest_R = to_rest_R + rows["rest_sum"].double().log()
    s_RB = torch.cat([(listed_RK - column(top_R)) / tau, column(log_rest_R)], 1)
    log_z_R = s_RB.logsumexp(1)
    # A tail within the rounding of the targets is none where the student rules out all ids that it could be of.
    no_tail_R = (rows["rest_max"] == -math.inf) & (buckets.log_tail_R <= math.log(_ROUNDING))
    log_tail_R = torch.where(no_tail_R, -math.inf, buckets.log_tail_R)
    entries = Entries.of(torch.cat([buckets.log_p_RK, column(log_tail_R)], 1), s_RB - column(log_z_R))
    if term.tail == "spread":
        sums = _spread_sums(rows, buckets, entries, term, top_R, log_z_R)
    else:
        sums = _bucket_sums(entries, term)
    rest_sum_R = rows["rest_sum"].double()
    of_rest_R = torch.where(rest_sum_R == 0, 0.0, sums.rest_R / rest_sum_R)  # by shares of the rest: q may underflow
    factor_R = of_rest_R - product((to_rest_R - log_z_R).exp(), sums.total_R)
    listed_q_RK = entries.q[:, :-1]
    listed_KR = (sums.slope_RK - product(listed_q_RK, column(sums.total_R).expand_as(listed_q_RK))).t()
    by_logit_R = weight_R.double() * (term.scale / tau)
    weighted = (_weighted(by_logit_R, x) for x in (factor_R, sums.shift_R, listed_KR))
    slope = SparseSlope(*(x.to(rows.values_kR.dtype) for x in weighted))
    return SparseValues(sums.value_R, _agree(rows, buckets), slope)


@dataclass(frozen=True)
class _Sums:
    """value_R: the divergence. slope_RK: w of the listed ids. total_R: sum of w over all ids. rest_R: of that what the
    ids that are not listed have together, each in proportion to its q; and each -shift_R more."""

    value_R: Tensor
    slope_RK: Tensor
    total_R: Tensor
    rest_R: Tensor
    shift_R: Tensor


def _bucket_sums(entries: Entries, term: KDTerm) -> _Sums:
    """All ids that are not listed are one bucket in both models."""
    pointwise = POINTWISE[term.formula]
    slope_RB = pointwise.slope(entries, term)
    return _Sums(
        value_R=pointwise.value(entries, term).sum(1),
        slope_RK=slope_RB[:, :-1],
        total_R=slope_RB.sum(1),
        rest_R=slope_RB[:, -1],
        shift_R=torch.zeros_like(slope_RB[:, -1]),
    )


def _spread_sums(
    rows: RowStatistics, buckets: Buckets, entries: Entries, term: KDTerm, top_R: Tensor, log_z_R: Tensor
) -> _Sums:
    """Forward KL (or soft cross-entropy) where each id that is not listed has an even share of the tail."""
    listed_log_q_RK = torch.where(buckets.ids_RK < 0, 0.0, entries.log_q[:, :-1])
    pivot_R = torch.where(rows["lm_max"] == -math.inf, 0.0, rows["lm_max"]).double()
    to_log_q_R = (pivot_R - top_R) / term.student_temperature - log_z_R  # from logits relative to lm_max to log q
    rest_log_q_R = rows["total"].double() + rows["count"].double() * to_log_q_R - listed_log_q_RK.sum(1)
    log_share_R = buckets.log_tail_R - buckets.num_rest_R.clamp(min=1).double().log()
    share_R = torch.where(buckets.num_rest_R > 0, log_share_R.exp(), 0.0)
    value_R = POINTWISE[term.formula].value(entries, term)[:, :-1].sum(1) + product(share_R, -rest_log_q_R)
    if term.formula == "forward_kl":
        value_R = value_R + product(entries.p[:, -1], log_share_R)
    return _Sums(value_R, -entries.p[:, :-1], -entries.p.sum(1), torch.zeros_like(share_R), share_R)


def _agree(rows: RowStatistics, buckets: Buckets) -> Tensor:
    return (buckets.is_top_RK & (rows.listed_KR.t() == column(rows["lm_max"]))).any(1)


def _weighted(weight_R: Tensor, values: Tensor) -> Tensor:
    """weight · values (``[R]`` or ``[K, R]``), exactly 0 where the weight is."""
    return torch.where(weight_R == 0, 0.0, weight_R * values)

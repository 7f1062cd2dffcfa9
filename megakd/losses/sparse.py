"""Divergences from sparse targets: a row becomes a bucket for each listed id and one for all other ids.

Axes: ``R`` rows, ``K`` listed ids (one more where the tail goes onto the label), ``V`` the vocabulary.

Every divergence that is a sum over ids is, on such targets, a sum over the K + 1 buckets, made with the same formulas
of one entry as for whole rows. After the one all-gather every rank has the logits of the listed ids, so every rank does
this small part of the work, in float64; only the walk over the vocabulary is split. Derivations:
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
    """Sparse targets of rows once the term's tail is applied.

    ids_RK: int64, -1 in empty slots.
    log_p_RK: float64, -inf in empty slots, NaN for ids outside the vocabulary.
    log_tail_R: float64, log of the mass of all ids that are not listed.
    num_rest_R: the number of ids that are not listed.
    is_top_RK: bool, True for the ids with the largest mass, before the tail is applied.
    """

    ids_RK: Tensor
    log_p_RK: Tensor
    log_tail_R: Tensor
    num_rest_R: Tensor
    is_top_RK: Tensor

    @staticmethod
    def of(targets: SparseTargets, labels_R: Tensor, term: KDTerm, vocab_size: int) -> Buckets:
        """Make the buckets of rows from their targets and labels."""
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
            # A tail below the rounding of log-probabilities is unknown, and 0 would make some divergences infinite.
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
    """Add a mass to the label: in its slot where the label is listed, else in an additional slot."""
    is_label_RK = ids_RK == column(labels_R)
    listed_R = is_label_RK.any(1)
    log_p_RK = torch.where(is_label_RK, torch.logaddexp(log_p_RK, column(log_mass_R).expand_as(log_p_RK)), log_p_RK)
    is_extra_R = ~listed_R & (log_mass_R > -math.inf)
    extra_id_R1 = column(torch.where(is_extra_R, labels_R, -1))
    extra_log_p_R1 = column(torch.where(is_extra_R, log_mass_R, -math.inf))
    return torch.cat([ids_RK, extra_id_R1], 1), torch.cat([log_p_RK, extra_log_p_R1], 1)


@dataclass(frozen=True)
class SparseValues:
    """Values of a divergence from sparse targets.

    value_R: float64, the divergence in nats. agree_R: bool, True if the student's top-1 id is the teacher's. slope: the
    gradient of the weighted divergence.
    """

    value_R: Tensor
    agree_R: Tensor
    slope: SparseSlope


def sparse_values(rows: RowStatistics, buckets: Buckets, term: KDTerm, weight_R: Tensor) -> SparseValues:
    """Make a divergence and its gradient from merged statistics. weight_R: the weight of the divergence in each row."""
    tau, empty_RK = term.student_temperature, buckets.ids_RK < 0
    listed_RK = torch.where(empty_RK, -math.inf, rows.listed_KR.t().double())
    # log-probabilities of the student, relative to the largest logit so that nothing overflows
    top_R = torch.maximum(listed_RK.amax(1), rows["rest_max"].double())
    top_R = torch.where(top_R == -math.inf, 0.0, top_R)
    to_rest_R = (rows["rest_max"].double() - top_R) / tau  # -inf where there is no rest
    log_rest_R = to_rest_R + rows["rest_sum"].double().log()
    s_RB = torch.cat([(listed_RK - column(top_R)) / tau, column(log_rest_R)], 1)
    log_z_R = s_RB.logsumexp(1)
    # A tail within the rounding of the targets counts as none where the student rules out all ids that are not listed.
    no_tail_R = (rows["rest_max"] == -math.inf) & (buckets.log_tail_R <= math.log(_ROUNDING))
    log_tail_R = torch.where(no_tail_R, -math.inf, buckets.log_tail_R)
    entries = Entries.of(torch.cat([buckets.log_p_RK, column(log_tail_R)], 1), s_RB - column(log_z_R))
    if term.tail == "spread":
        sums = _spread_sums(rows, buckets, entries, term, top_R, log_z_R)
    else:
        sums = _bucket_sums(entries, term)
    rest_sum_R = rows["rest_sum"].double()
    of_rest_R = torch.where(rest_sum_R == 0, 0.0, sums.rest_R / rest_sum_R)  # shares of the rest, for q may underflow
    factor_R = of_rest_R - product((to_rest_R - log_z_R).exp(), sums.total_R)
    listed_q_RK = entries.q[:, :-1]
    listed_KR = (sums.slope_RK - product(listed_q_RK, column(sums.total_R).expand_as(listed_q_RK))).t()
    by_logit_R = weight_R.double() * (term.scale / tau)
    weighted = (_weighted(by_logit_R, x) for x in (factor_R, sums.shift_R, listed_KR))
    slope = SparseSlope(*(x.to(rows.values_kR.dtype) for x in weighted))
    return SparseValues(sums.value_R, _agree(rows, buckets), slope)


@dataclass(frozen=True)
class _Sums:
    """Sums over the buckets of a row, with w = q · dD/dq as in ``docs/numerics.md``.

    value_R: the divergence. slope_RK: w of the listed ids. total_R: sum of w over all ids. rest_R: the part of that sum
    which the ids that are not listed share in proportion to q. shift_R: subtracted from w of each of those ids besides.
    """

    value_R: Tensor
    slope_RK: Tensor
    total_R: Tensor
    rest_R: Tensor
    shift_R: Tensor


def _bucket_sums(entries: Entries, term: KDTerm) -> _Sums:
    """Sums where all ids that are not listed are one bucket in both models."""
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
    """Sums of forward KL (or soft cross-entropy) where each id that is not listed has an even share of the tail."""
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
    """weight · values (``[R]`` or ``[K, R]``), exactly 0 where the weight is 0."""
    return torch.where(weight_R == 0, 0.0, weight_R * values)

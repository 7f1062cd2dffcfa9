"""The divergences from dense targets: the sums over a row that each needs, and its value and gradient from them.

Axes: ``R`` rows (tokens), ``v`` this rank's slice of the vocabulary. p is the teacher's distribution and q the
student's, each a softmax over the whole vocabulary after its temperature. Nothing here knows about processes: a
divergence names the sums that it needs of the other slices in ``first_pass`` and ``second_pass``, and by the time it is
called they have been merged. Derivations are in ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.pointwise import POINTWISE, Entries, product
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics, pivot


@dataclass(frozen=True)
class DenseEntries:
    """Entries of student and teacher in a slice of rows, ``[R, v]`` each, from which gradients are made.

    s_Rv, t_Rv: logits of student and teacher relative to the row's maximum, divided by their temperature.
    p_Rv, q_Rv: probabilities of teacher and student. is_label_Rv: bool, True at the label.
    Where a divergence treats the label apart, the first four are those of the row without its label.
    """

    s_Rv: Tensor
    t_Rv: Tensor
    p_Rv: Tensor
    q_Rv: Tensor
    is_label_Rv: Tensor


@dataclass(frozen=True)
class Divergence:
    """One divergence D(p, q) from dense targets.

    first_pass: names of the sums, beside the softmax statistics, that the first pass over a row makes.
    second_pass: names of the sums that need probabilities, hence a second pass once the first sums are merged.
    value: returns ``[R]``, D of each row in nats, from merged statistics.
    gradient: returns ``[R, v]``, the derivative of D by the student's logits divided by their temperature.
    """

    first_pass: tuple[str, ...]
    second_pass: tuple[str, ...]
    value: Callable[[RowStatistics, KDTerm], Tensor]
    gradient: Callable[[DenseEntries, RowStatistics, KDTerm], Tensor]


def column(values_R: Tensor) -> Tensor:
    return values_R.unsqueeze(1)


def teacher_entropy(rows: RowStatistics, term: KDTerm) -> Tensor:
    """H(p) = log sum exp(t') - E_p[t'], in nats."""
    entropy_R = rows["teacher_sum"].log() - rows["teacher_self"] / rows["teacher_sum"]
    if "teacher_label" not in rows.columns:
        return entropy_R
    # The sums leave the label out: add the entropy of the choice between the label and the rest.
    log_odds_R, _ = label_log_odds(rows, term)
    log_p = torch.nn.functional.logsigmoid(torch.stack([log_odds_R, -log_odds_R]))
    return product(log_p[1].exp(), entropy_R) - product(log_p.exp(), log_p).sum(0)


def forward_kl(rows: RowStatistics, term: KDTerm) -> Tensor:
    """KL(p || q) = E_p[t' - s'] - log sum exp(t') + log sum exp(s')."""
    return rows["forward"] / rows["teacher_sum"] + (rows["student_sum"] / rows["teacher_sum"]).log()


def soft_cross_entropy(rows: RowStatistics, term: KDTerm) -> Tensor:
    """-E_p[log q] = KL(p || q) + H(p); its gradient is forward KL's."""
    return forward_kl(rows, term) + teacher_entropy(rows, term)


def reverse_kl(rows: RowStatistics, term: KDTerm) -> Tensor:
    """KL(q || p) = E_q[s' - t'] - log sum exp(s') + log sum exp(t')."""
    return rows["reverse"] / rows["student_sum"] - (rows["student_sum"] / rows["teacher_sum"]).log()


def _mixed_kl(rows: RowStatistics, term: KDTerm, reverse_weight_R: Tensor) -> Tensor:
    """(1 - w) KL(p || q) + w KL(q || p), where a direction of weight 0 adds nothing, even if it is infinite."""
    forward_R = product(1 - reverse_weight_R, forward_kl(rows, term))
    return forward_R + product(reverse_weight_R, reverse_kl(rows, term))


def symmetric_kl(rows: RowStatistics, term: KDTerm) -> Tensor:
    """(1 - w) KL(p || q) + w KL(q || p)."""
    return _mixed_kl(rows, term, torch.full_like(rows["forward"], term.reverse_weight))


def adaptive_reverse_weight(rows: RowStatistics) -> Tensor:
    """Weight ``[R]`` of reverse KL in adaptive_kl: the tail's share of the gap; one half where there is no gap."""
    total_R = rows["head_gap"] + rows["tail_gap"]
    return torch.where(total_R == 0, 0.5, rows["tail_gap"] / total_R)


def adaptive_kl(rows: RowStatistics, term: KDTerm) -> Tensor:
    """AKL (arXiv 2404.02657): forward and reverse KL, weighted by the shares of head and tail in the gap of p and q."""
    return _mixed_kl(rows, term, adaptive_reverse_weight(rows))


def mean_square(rows: RowStatistics, term: KDTerm) -> Tensor:
    """Mean over the ids of the squared difference of logits."""
    return rows["square"] / rows["count"]


def label_log_odds(rows: RowStatistics, term: KDTerm) -> tuple[Tensor, Tensor]:
    """log of p_y / (1 - p_y) of teacher and student, ``[R]`` each, from rows whose sums leave the label out."""
    teacher_R = (rows["teacher_label"] - pivot(rows["teacher_max"])) / term.temperature - rows["teacher_sum"].log()
    student_R = (rows["student_label"] - pivot(rows["student_max"])) / term.student_temperature
    return teacher_R, student_R - rows["student_sum"].log()


def label_kl(rows: RowStatistics, term: KDTerm) -> Tensor:
    """KL between (p_y, 1 - p_y) and (q_y, 1 - q_y): the target part of DKD."""
    log_odds = label_log_odds(rows, term)
    log_p, log_q = (torch.nn.functional.logsigmoid(torch.stack([odds, -odds])) for odds in log_odds)
    return product(log_p.exp(), log_p - log_q).sum(0)


def decoupled(rows: RowStatistics, term: KDTerm) -> Tensor:
    """alpha · label part + beta · KL among the other ids (DKD, arXiv 2203.08679, equation 7)."""
    label_R = term.dkd_alpha * label_kl(rows, term)
    # with a weight of 0 it adds nothing, even if it is infinite
    return label_R + term.dkd_beta * forward_kl(rows, term) if term.dkd_beta else label_R


def second_value(rows: RowStatistics, term: KDTerm) -> Tensor:
    return rows["value"]


def forward_kl_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """q - p."""
    return dense.q_Rv - dense.p_Rv


def reverse_kl_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """q ((s' - t') - E_q[s' - t'])."""
    mean_R1 = column(rows["reverse"] / rows["student_sum"])
    return product(dense.q_Rv, dense.s_Rv - dense.t_Rv - mean_R1)


def symmetric_kl_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    reverse = reverse_kl_gradient(dense, rows, term)
    return (1 - term.reverse_weight) * forward_kl_gradient(dense, rows, term) + term.reverse_weight * reverse


def adaptive_kl_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """Mix of both gradients; the weights count as constants, as in the paper (arXiv 2404.02657)."""
    weight_R1 = column(adaptive_reverse_weight(rows))
    reverse = reverse_kl_gradient(dense, rows, term)
    return (1 - weight_R1) * forward_kl_gradient(dense, rows, term) + weight_R1 * reverse


def logit_difference(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """s / tau_s - t / tau_t, and 0 for an id that both models rule out."""
    offset_R1 = column(
        pivot(rows["student_max"]) / term.student_temperature - pivot(rows["teacher_max"]) / term.temperature
    )
    both = (dense.s_Rv == -math.inf) & (dense.t_Rv == -math.inf)
    return torch.where(both, 0.0, dense.s_Rv - dense.t_Rv + offset_R1)


def logit_mse_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """2 d / n."""
    return 2 / column(rows["count"]) * logit_difference(dense, rows, term)


def centred_difference(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """d - mean d. The mean leaves out infinite differences, which make the sum of squares infinite anyway."""
    both = (dense.s_Rv == -math.inf) & (dense.t_Rv == -math.inf)
    mean_R1 = column(rows["difference"] / rows["count"])
    return torch.where(both, 0.0, logit_difference(dense, rows, term) - mean_R1)


def finite_difference(difference_Rv: Tensor) -> Tensor:
    """Differences of logits with 0 in place of infinite ones, for the mean of the centred error; NaN stays."""
    return torch.where(difference_Rv.isinf(), 0.0, difference_Rv)


def centred_logit_mse_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """2 (d - mean d) / n."""
    return 2 / column(rows["count"]) * centred_difference(dense, rows, term)


def decoupled_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """At the label alpha (q_y - p_y); elsewhere beta (q' - p') - alpha (q_y - p_y) q', both among the other ids."""
    teacher_odds_R, student_odds_R = label_log_odds(rows, term)
    label_R1 = term.dkd_alpha * column(student_odds_R.sigmoid() - teacher_odds_R.sigmoid())
    others_Rv = term.dkd_beta * (dense.q_Rv - dense.p_Rv) - label_R1 * dense.q_Rv
    return torch.where(dense.is_label_Rv, label_R1, others_Rv)


def pointwise_entries(dense: DenseEntries, rows: RowStatistics) -> Entries:
    return Entries(
        log_p=dense.t_Rv - column(rows["teacher_sum"].log()),
        log_q=dense.s_Rv - column(rows["student_sum"].log()),
        p=dense.p_Rv,
        q=dense.q_Rv,
    )


def pointwise_gradient(dense: DenseEntries, rows: RowStatistics, term: KDTerm) -> Tensor:
    """w - q · sum(w)."""
    slope_Rv = POINTWISE[term.formula].slope(pointwise_entries(dense, rows), term)
    return slope_Rv - product(dense.q_Rv, column(rows["slope"]).expand_as(slope_Rv))


_MIXTURE = Divergence((), ("value", "slope"), second_value, pointwise_gradient)

DIVERGENCES = {
    "forward_kl": Divergence(("forward",), (), forward_kl, forward_kl_gradient),
    "soft_cross_entropy": Divergence(("forward",), (), soft_cross_entropy, forward_kl_gradient),
    "reverse_kl": Divergence(("reverse",), (), reverse_kl, reverse_kl_gradient),
    "symmetric_kl": Divergence(("forward", "reverse"), (), symmetric_kl, symmetric_kl_gradient),
    "adaptive_kl": Divergence(("forward", "reverse"), ("head_gap", "tail_gap"), adaptive_kl, adaptive_kl_gradient),
    "generalised_jsd": _MIXTURE,
    "skew_forward_kl": _MIXTURE,
    "skew_reverse_kl": _MIXTURE,
    "total_variation": _MIXTURE,
    "alpha_beta": _MIXTURE,
    "logit_mse": Divergence(("square", "count"), (), mean_square, logit_mse_gradient),
    "centred_logit_mse": Divergence(("difference", "count"), ("square",), mean_square, centred_logit_mse_gradient),
    "decoupled": Divergence(
        ("forward", "student_label", "teacher_label", "student_top", "teacher_top"), (), decoupled, decoupled_gradient
    ),
}
"""Every formula (``KDTerm.formula``) on dense targets."""

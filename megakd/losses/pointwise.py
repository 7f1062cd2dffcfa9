"""The divergences that are a sum over ids, as formulas of one entry: its value, and its slope derived by hand.

p is the teacher's probability and q the student's. The formulas take log-probabilities, which tell an id of probability
0 from one whose probability underflows. They serve whole rows and the buckets of sparse targets alike. Derivations are
in ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.terms import KDTerm


@dataclass(frozen=True)
class Entries:
    """Entries of a row under both models: log-probabilities and probabilities, -inf and 0 for an id ruled out."""

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor

    @staticmethod
    def of(log_p: Tensor, log_q: Tensor) -> Entries:
        return Entries(log_p, log_q, log_p.exp(), log_q.exp())


@dataclass(frozen=True)
class Pointwise:
    """D = sum over entries of ``value``; ``slope`` is w = q · dD/dq of an entry, up to a multiple of q.

    The derivative by the student's logit over temperature is then w - q · sum(w).
    """

    value: Callable[[Entries, KDTerm], Tensor]
    slope: Callable[[Entries, KDTerm], Tensor]


def product(mass: Tensor, factor: Tensor) -> Tensor:
    """mass · factor, exactly 0 for an entry without mass, whatever its factor."""
    return torch.where(mass == 0, 0.0, mass * factor)


def _log_mixture(e: Entries, on_p: float) -> Tensor:
    """log(on_p · p + (1 - on_p) · q), for 0 < on_p < 1."""
    return torch.logaddexp(e.log_p + math.log(on_p), e.log_q + math.log1p(-on_p))


def forward_kl_entry(e: Entries, term: KDTerm) -> Tensor:
    return product(e.p, e.log_p - e.log_q)


def soft_cross_entropy_entry(e: Entries, term: KDTerm) -> Tensor:
    return product(e.p, -e.log_q)


def forward_kl_slope(e: Entries, term: KDTerm) -> Tensor:
    return -e.p


def reverse_kl_entry(e: Entries, term: KDTerm) -> Tensor:
    return product(e.q, e.log_q - e.log_p)


def symmetric_entry(e: Entries, term: KDTerm) -> Tensor:
    return (1 - term.reverse_weight) * forward_kl_entry(e, term) + term.reverse_weight * reverse_kl_entry(e, term)


def symmetric_slope(e: Entries, term: KDTerm) -> Tensor:
    return (1 - term.reverse_weight) * -e.p + term.reverse_weight * reverse_kl_entry(e, term)


def jsd_entry(e: Entries, term: KDTerm) -> Tensor:
    log_m = _log_mixture(e, term.jsd_beta)
    return term.jsd_beta * product(e.p, e.log_p - log_m) + (1 - term.jsd_beta) * product(e.q, e.log_q - log_m)


def jsd_slope(e: Entries, term: KDTerm) -> Tensor:
    return (1 - term.jsd_beta) * product(e.q, e.log_q - _log_mixture(e, term.jsd_beta))


def skew_forward_entry(e: Entries, term: KDTerm) -> Tensor:
    return product(e.p, e.log_p - _log_mixture(e, term.skew_alpha))


def skew_forward_slope(e: Entries, term: KDTerm) -> Tensor:
    return (term.skew_alpha - 1) * product(e.p, (e.log_q - _log_mixture(e, term.skew_alpha)).exp())


def skew_reverse_entry(e: Entries, term: KDTerm) -> Tensor:
    return product(e.q, e.log_q - _log_mixture(e, 1 - term.skew_alpha))


def skew_reverse_slope(e: Entries, term: KDTerm) -> Tensor:
    log_ratio = e.log_q - _log_mixture(e, 1 - term.skew_alpha)
    return product(e.q, log_ratio - term.skew_alpha * log_ratio.exp())


def total_variation_entry(e: Entries, term: KDTerm) -> Tensor:
    return 0.5 * (e.p - e.q).abs()


def total_variation_slope(e: Entries, term: KDTerm) -> Tensor:
    return 0.5 * e.q * (e.q - e.p).sign()


def _where_possible(e: Entries, values: Tensor) -> Tensor:
    """Values with 0 in place of those of ids that both models rule out."""
    return torch.where((e.log_p == -math.inf) & (e.log_q == -math.inf), 0.0, values)


def _value_limit(e: Entries, values: Tensor) -> Tensor:
    """Values with the limit in place of differences of infinities, which powers of small probabilities make.

    No entry of alpha_beta is below 0, and the largest of its terms has a positive sign, so the limit is +inf, or 0
    where p = q. NaN logits stay NaN.
    """
    limit = (e.log_p - e.log_q).abs() + math.inf
    return torch.where(values > -math.inf, values, torch.where(e.log_p == e.log_q, 0.0, limit))


def _slope_limit(e: Entries, slopes: Tensor) -> Tensor:
    """Slopes of alpha_beta with the limit, of the sign of q - p, in place of differences of infinities; NaN stays."""
    limit = (e.log_q - e.log_p) * math.inf
    return torch.where(slopes == slopes, slopes, torch.where(e.log_p == e.log_q, 0.0, limit))


def _power(log_p: Tensor, a: float, log_q: Tensor, b: float) -> Tensor:
    """p^a · q^b, where an exponent of 0 leaves its factor out."""
    exponent = a * log_p if a else torch.zeros_like(log_p)
    return (exponent + b * log_q if b else exponent).exp()


def alpha_beta_entry(e: Entries, term: KDTerm) -> Tensor:
    a, b = term.ab_alpha, term.ab_beta
    gap = e.log_p - e.log_q
    if a == 0 and b == 0:
        value = 0.5 * gap.square()
    elif a == 0:
        q_b = _power(e.log_p, 0, e.log_q, b)
        value = (product(q_b, -b * gap) - q_b + _power(e.log_p, b, e.log_q, 0)) / b**2
    elif b == 0:
        p_a = _power(e.log_p, a, e.log_q, 0)
        value = (product(p_a, a * gap) - p_a + _power(e.log_p, 0, e.log_q, a)) / a**2
    elif a + b == 0:
        value = ((a * gap).exp() - a * gap - 1) / a**2
    else:
        ends = a * _power(e.log_p, a + b, e.log_q, 0) + b * _power(e.log_p, 0, e.log_q, a + b)
        value = (ends - (a + b) * _power(e.log_p, a, e.log_q, b)) / (a * b * (a + b))
    return _where_possible(e, _value_limit(e, value))


def alpha_beta_slope(e: Entries, term: KDTerm) -> Tensor:
    a, b = term.ab_alpha, term.ab_beta
    if a == 0:
        slope = product(_power(e.log_p, 0, e.log_q, b), e.log_q - e.log_p)
    else:
        slope = (_power(e.log_p, 0, e.log_q, a + b) - _power(e.log_p, a, e.log_q, b)) / a
    return _where_possible(e, _slope_limit(e, slope))


POINTWISE = {
    "forward_kl": Pointwise(forward_kl_entry, forward_kl_slope),
    "soft_cross_entropy": Pointwise(soft_cross_entropy_entry, forward_kl_slope),
    "reverse_kl": Pointwise(reverse_kl_entry, reverse_kl_entry),
    "symmetric_kl": Pointwise(symmetric_entry, symmetric_slope),
    "generalised_jsd": Pointwise(jsd_entry, jsd_slope),
    "skew_forward_kl": Pointwise(skew_forward_entry, skew_forward_slope),
    "skew_reverse_kl": Pointwise(skew_reverse_entry, skew_reverse_slope),
    "total_variation": Pointwise(total_variation_entry, total_variation_slope),
    "alpha_beta": Pointwise(alpha_beta_entry, alpha_beta_slope),
}
"""Divergences that are a sum over ids of a function of p and q."""

"""The divergences for Triton: the addition of one entry of a row to the sums, and its slope, as in ``pointwise.py``.

s and t are logits relative to the row's maximum after temperature, p and q probabilities of teacher and student. An
entry that both models rule out (-inf, the value loaded for entries beyond a slice) adds exactly 0. ``FORMULA`` is a
``KDTerm.formula``, or a case of alpha_beta; x and y are the divergence's own numbers, see ``launch.Formula``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(mass, factor):
    """mass · factor, exactly 0 for an entry without mass, whatever its factor."""
    return tl.where(mass == 0.0, 0.0, mass * factor)


@triton.jit
def weighted(weight, slope):
    """weight · slope, exactly 0 where the weight is 0, whatever the slope."""
    return tl.where(weight == 0.0, 0.0, weight * slope)


@triton.jit
def pivot(maximum):
    """The number to subtract before exp: the maximum, or 0 where no entry is finite."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def possible(s, t, values):
    """Values with 0 in place of those of ids that both models rule out."""
    return tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, values)


@triton.jit
def logit_difference(s, t, inverse_tau_s, inverse_tau_t):
    """s / tau_s - t / tau_t from logits with no maximum subtracted; 0 for an id that both models rule out."""
    return possible(s, t, s * inverse_tau_s - t * inverse_tau_t)


@triton.jit
def finite_difference(difference):
    """A difference of logits, with 0 in place of an infinite one, for the mean of the centred error; NaN stays."""
    return tl.where(tl.abs(difference) == float("inf"), 0.0, difference)


@triton.jit
def value_limit(log_p, log_q, value):
    """A value of alpha_beta, with +inf (0 where p = q) in place of a difference of infinities; NaN logits stay."""
    limit = tl.abs(log_p - log_q) + float("inf")
    return tl.where(value > float("-inf"), value, tl.where(log_p == log_q, 0.0, limit))


@triton.jit
def slope_limit(log_p, log_q, slope):
    """A slope of alpha_beta, with an infinity of q - p's sign in place of a difference of infinities; NaN stays."""
    limit = (log_q - log_p) * float("inf")
    return tl.where(slope == slope, slope, tl.where(log_p == log_q, 0.0, limit))


@triton.jit
def log_add_exp(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return tl.where(high == float("-inf"), high, high + tl.log(1.0 + tl.exp(low - high)))


@triton.jit
def power(log_p, a, log_q, b):
    """p^a · q^b for exponents other than 0."""
    return tl.exp(a * log_p + b * log_q)


@triton.jit
def jsd(log_p, log_q, p, q, x, log_on_p, log_on_q):
    log_m = log_add_exp(log_p + log_on_p, log_q + log_on_q)
    from_q = (1.0 - x) * product(q, log_q - log_m)
    return x * product(p, log_p - log_m) + from_q, from_q


@triton.jit
def skew_forward_kl(log_p, log_q, p, q, x, log_on_p, log_on_q):
    log_m = log_add_exp(log_p + log_on_p, log_q + log_on_q)
    return product(p, log_p - log_m), (x - 1.0) * product(p, tl.exp(log_q - log_m))


@triton.jit
def skew_reverse_kl(log_p, log_q, p, q, x, log_on_p, log_on_q):
    log_ratio = log_q - log_add_exp(log_p + log_on_p, log_q + log_on_q)
    return product(q, log_ratio), product(q, log_ratio - x * tl.exp(log_ratio))


@triton.jit
def total_variation(p, q):
    gap = q - p
    sign = tl.where(gap > 0.0, 1.0, tl.where(gap < 0.0, -1.0, gap))  # a gap of 0 or NaN is its own sign
    return 0.5 * tl.abs(gap), 0.5 * q * sign


@triton.jit
def alpha_beta(FORMULA: tl.constexpr, log_p, log_q, a, b):
    """Value and slope of alpha_beta, one case for each limit: both exponents 0, one of them, their sum, none."""
    gap = log_p - log_q
    if FORMULA == "alpha_beta_0_0":
        return 0.5 * gap * gap, -gap
    elif FORMULA == "alpha_beta_0_b":
        q_b = tl.exp(b * log_q)
        return (product(q_b, -b * gap) - q_b + tl.exp(b * log_p)) / (b * b), product(q_b, -gap)
    elif FORMULA == "alpha_beta_a_0":
        p_a, q_a = tl.exp(a * log_p), tl.exp(a * log_q)
        return (product(p_a, a * gap) - p_a + q_a) / (a * a), (q_a - p_a) / a
    elif FORMULA == "alpha_beta_opposite":
        ratio = tl.exp(a * gap)
        return (ratio - a * gap - 1.0) / (a * a), (1.0 - ratio) / a
    else:
        p_ab, q_ab, mixed = tl.exp((a + b) * log_p), tl.exp((a + b) * log_q), power(log_p, a, log_q, b)
        return (a * p_ab + b * q_ab - (a + b) * mixed) / (a * b * (a + b)), (q_ab - mixed) / a


@triton.jit
def value_and_slope(FORMULA: tl.constexpr, log_p, log_q, p, q, x, y, log_on_p, log_on_q):
    """Value, and slope w = q · dD/dq up to a multiple of q, of a divergence that needs probabilities."""
    if FORMULA == "generalised_jsd":
        value, slope = jsd(log_p, log_q, p, q, x, log_on_p, log_on_q)
    elif FORMULA == "skew_forward_kl":
        value, slope = skew_forward_kl(log_p, log_q, p, q, x, log_on_p, log_on_q)
    elif FORMULA == "skew_reverse_kl":
        value, slope = skew_reverse_kl(log_p, log_q, p, q, x, log_on_p, log_on_q)
    elif FORMULA == "total_variation":
        value, slope = total_variation(p, q)
    else:
        value, slope = alpha_beta(FORMULA, log_p, log_q, x, y)
        value, slope = value_limit(log_p, log_q, value), slope_limit(log_p, log_q, slope)
    return possible(log_q, log_p, value), possible(log_q, log_p, slope)


@triton.jit
def kl_slope(FORMULA: tl.constexpr, s, t, p, q, mean, reverse_weight):
    """Derivative of forward, reverse, or mixed KL by the student's logits over temperature; mean is E_q[s - t]."""
    reverse = product(q, s - t - mean)
    if FORMULA == "forward_kl":
        slope = q - p
    elif FORMULA == "reverse_kl":
        slope = reverse
    else:
        slope = (1.0 - reverse_weight) * (q - p) + reverse_weight * reverse
    return slope

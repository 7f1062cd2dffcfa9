"""The divergences between teacher and student, each as the formulas of one row and one vocabulary entry.

Axes: ``R`` rows (tokens), ``v`` this rank's slice of the vocabulary. p is the teacher's distribution and q the
student's, each a softmax over the whole vocabulary after its temperature. Nothing here knows about processes: what a
divergence needs of the other slices it names in ``columns``, and by the time it is called they have been merged.
Derivations are in ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.losses.vocab_parallel import RowStatistics


@dataclass(frozen=True)
class Entries:
    """Every entry of a row slice under both models; -inf logits have probability exactly 0.

    s_Rv, t_Rv: logits relative to the row's maximum, after temperature.
    p_Rv, q_Rv: probabilities over the whole vocabulary.
    """

    s_Rv: Tensor
    t_Rv: Tensor
    p_Rv: Tensor
    q_Rv: Tensor


@dataclass(frozen=True)
class Divergence:
    """One divergence D(p, q).

    columns: the ratio columns its value is made of, beside the softmax statistics.
    value: ``[R]`` D of each row, in nats, from merged statistics.
    gradient: ``[R, v]`` derivative of D by the student's logits divided by their temperature.
    linear_in_teacher: whether D is linear in p up to terms without the student, so that sampled targets are unbiased.
    """

    columns: tuple[str, ...]
    value: Callable[[RowStatistics], Tensor]
    gradient: Callable[[Entries, RowStatistics], Tensor]
    linear_in_teacher: bool


def teacher_entropy(rows: RowStatistics) -> Tensor:
    """H(p) = log sum exp(t') - E_p[t'], in nats."""
    return rows["teacher_sum"].log() - rows["teacher_self"] / rows["teacher_sum"]


def forward_kl(rows: RowStatistics) -> Tensor:
    """KL(p || q) = E_p[t' - s'] - log sum exp(t') + log sum exp(s')."""
    return rows["forward"] / rows["teacher_sum"] + (rows["student_kd_sum"] / rows["teacher_sum"]).log()


def soft_cross_entropy(rows: RowStatistics) -> Tensor:
    """-E_p[log q] = KL(p || q) + H(p); its gradient is forward KL's."""
    return forward_kl(rows) + teacher_entropy(rows)


def reverse_kl(rows: RowStatistics) -> Tensor:
    """KL(q || p) = E_q[s' - t'] - log sum exp(s') + log sum exp(t')."""
    return rows["reverse"] / rows["student_kd_sum"] - (rows["student_kd_sum"] / rows["teacher_sum"]).log()


def forward_kl_gradient(entries: Entries, rows: RowStatistics) -> Tensor:
    """q - p."""
    return entries.q_Rv - entries.p_Rv


def reverse_kl_gradient(entries: Entries, rows: RowStatistics) -> Tensor:
    """q ((s' - t') - E_q[s' - t'])."""
    mean_R1 = (rows["reverse"] / rows["student_kd_sum"]).unsqueeze(1)
    return product(entries.q_Rv, entries.s_Rv - entries.t_Rv - mean_R1)


def product(mass_Rv: Tensor, factor_Rv: Tensor) -> Tensor:
    """mass · factor where an entry without mass gives exactly 0, whatever its factor."""
    return torch.where(mass_Rv == 0, 0.0, mass_Rv * factor_Rv)


DIVERGENCES = {
    "forward_kl": Divergence(("forward",), forward_kl, forward_kl_gradient, linear_in_teacher=True),
    "soft_cross_entropy": Divergence(("forward",), soft_cross_entropy, forward_kl_gradient, linear_in_teacher=True),
    "reverse_kl": Divergence(("reverse",), reverse_kl, reverse_kl_gradient, linear_in_teacher=False),
}
"""Every divergence by the name that configurations use."""

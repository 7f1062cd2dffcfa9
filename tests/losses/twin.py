"""The slow obvious twin of every loss on the output head: float64, whole vocabulary, one process, autograd.

Nothing here is shared with the code under test. If the two disagree, suspect the fast one. Axes: T tokens, V the true
vocabulary, K listed ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p · x over the vocabulary, where an entry without mass adds nothing; detached from what it leaves out."""
    return torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0).sum(-1)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _expect(log_a.exp(), log_a) - _expect(log_a.exp(), torch.where(log_a > -torch.inf, log_b, 0.0))


def _mix(log_a: Tensor, log_b: Tensor, on_a: float) -> Tensor:
    """log(on_a · a + (1 - on_a) · b): through logarithms, because both may underflow."""
    return torch.logaddexp(log_a + math.log(on_a), log_b + math.log(1 - on_a)) if on_a else log_b


def soft_cross_entropy(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return -_expect(log_p.exp(), log_q)


def forward_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return _kl(log_q, log_p)


def symmetric_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return (1 - term.reverse_weight) * _kl(log_p, log_q) + term.reverse_weight * _kl(log_q, log_p)


def generalised_jsd(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    beta = term.jsd_beta
    if beta in (0, 1):
        return _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
    log_m = _mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return _kl(log_p, _mix(log_p, log_q, term.skew_alpha))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return _kl(log_q, _mix(log_q, log_p, term.skew_alpha))


def adaptive_kl(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    """Row by row: sort, cut where the cumulative probability exceeds mu, weigh by the gaps."""
    weights = []
    for p, q in zip(log_p.exp().detach(), log_q.exp().detach()):
        order = p.argsort(descending=True)
        head = torch.zeros(len(p), dtype=torch.bool)
        head[order[p[order].cumsum(0) <= term.akl_mu]] = True
        head[order[0]] = True
        head |= term.akl_mu == 1  # the probabilities may add up to a little more
        gap = (p - q).abs()
        weights.append(gap[head].sum() / gap.sum())
    forward_weight = torch.stack(weights)
    return forward_weight * _kl(log_p, log_q) + (1 - forward_weight) * _kl(log_q, log_p)


def total_variation(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_beta(log_p: Tensor, log_q: Tensor, term: Any) -> Tensor:
    """ABKD's definition and its four limits."""
    a, b, p, q, gap = term.ab_alpha, term.ab_beta, log_p.exp(), log_q.exp(), log_p - log_q
    if a == 0 and b == 0:
        return 0.5 * gap.square().sum(-1)
    if a == 0:
        return (_expect((b * log_q).exp(), -b * gap) + ((b * log_p).exp() - (b * log_q).exp()).sum(-1)) / b**2
    if b == 0:
        return (_expect((a * log_p).exp(), a * gap) + ((a * log_q).exp() - (a * log_p).exp()).sum(-1)) / a**2
    if a + b == 0:
        return (-a * gap + (a * gap).exp() - 1).sum(-1) / a**2
    cross = (a * log_p + b * log_q).exp()
    return -(cross - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "generalised_jsd": generalised_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
}
"""Functions of log-probabilities."""


def _decoupled(student: Tensor, teacher: Tensor, labels: Tensor, term: Any) -> Tensor:
    """DKD as the paper writes it: the label against the rest, and the rest renormalised."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    is_label = torch.nn.functional.one_hot(labels, student.shape[-1]).bool()

    def binary(log: Tensor) -> Tensor:
        return torch.stack([log[is_label], log[~is_label].view(len(log), -1).logsumexp(-1)], -1)

    def others(log: Tensor) -> Tensor:
        return log[~is_label].view(len(log), -1).log_softmax(-1)

    label_part, other_part = _kl(binary(log_p), binary(log_q)), _kl(others(log_p), others(log_q))
    return term.dkd_alpha * label_part + term.dkd_beta * other_part


def dense(student: Tensor, teacher: Tensor, labels: Tensor, term: Any) -> Tensor:
    """The divergence of each row, from logits that both temperatures have divided."""
    if term.divergence == "logit_mse":
        return (student - teacher).square().mean(-1)
    if term.divergence == "centred_logit_mse":
        gap = student - teacher
        return (gap - gap.mean(-1, keepdim=True)).square().mean(-1)
    if term.divergence == "decoupled":
        return _decoupled(student, teacher, labels, term)
    if term.divergence == "taid":
        return _kl(teacher.log_softmax(-1), student.log_softmax(-1))
    return DIVERGENCES[term.divergence](teacher.log_softmax(-1), student.log_softmax(-1), term)


def sparse(student: Tensor, ids_TK: Tensor, log_probs_TK: Tensor, labels: Tensor, term: Any) -> Tensor:
    """Divergence from sparse targets, one row at a time, each tail by its definition. ``student``: tempered logits."""
    values = []
    for row, ids, log_p, label in zip(student, ids_TK, log_probs_TK.double(), labels):
        ids, log_p = ids[log_p > -torch.inf], log_p[log_p > -torch.inf]
        log_q = row.log_softmax(-1)
        if term.tail == "renormalise":
            log_p = (log_p / term.temperature).log_softmax(-1)
        p, tail = log_p.exp(), (1 - log_p.exp().sum()).clamp(min=0)
        rest = torch.ones(len(row), dtype=torch.bool)
        rest[ids] = False
        if term.tail == "ghost":
            bucket_p, bucket_q = torch.cat([p, tail[None]]), torch.cat([log_q[ids], log_q[rest].logsumexp(0)[None]])
            values.append(DIVERGENCES[term.divergence](bucket_p.log()[None], bucket_q[None], term)[0])
            continue
        whole = torch.zeros(len(row), dtype=torch.float64)
        whole[ids] = p
        if term.tail == "spread":
            whole[rest] = tail / rest.sum()
        if term.tail == "label":
            whole[label] += tail
        values.append(DIVERGENCES[term.divergence](whole.log()[None], log_q[None], term)[0])
    return torch.stack(values)


@dataclass(frozen=True)
class Twin:
    loss: Tensor
    lm_T: Tensor
    kd_T: list[Tensor]
    entropy_T: list[Tensor | None]
    gradients: tuple[Tensor, ...]


def logits_twin(
    student_TV: Tensor,
    labels_T: Tensor,
    lm_weight_T: Tensor,
    terms: list[tuple[Any, Any, Tensor]],
    *,
    z_weight_T: Tensor | None = None,
    inputs: tuple[Tensor, ...] | None = None,
) -> Twin:
    """Loss and its gradient by ``inputs`` (the student's logits, unless given) from logits of the true vocabulary.

    terms: (term, teacher's logits ``[T, V]`` or sparse targets, weights ``[T]``).
    """
    if inputs is None:
        student_TV = student_TV.detach().double().requires_grad_()
        inputs = (student_TV,)
    keep_T = lm_weight_T != 0
    for _, _, weight_T in terms:
        keep_T = keep_T | (weight_T != 0)
    if z_weight_T is not None:
        keep_T = keep_T | (z_weight_T != 0)
    student, labels = student_TV[keep_T].double(), labels_T[keep_T].clamp(0, student_TV.shape[1] - 1)

    def weighted(weight_T: Tensor, values: Tensor) -> Tensor:
        has = weight_T[keep_T] != 0
        return (weight_T[keep_T].double()[has] * values[has]).sum()

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(keep_T.shape, dtype=torch.float64).index_put((keep_T,), values.detach())

    lm = -student.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    loss = weighted(lm_weight_T, lm)
    if z_weight_T is not None:
        loss = loss + weighted(z_weight_T, student.logsumexp(-1).square())
    kd_T: list[Tensor] = []
    entropy_T: list[Tensor | None] = []
    for term, targets, weight_T in terms:
        tempered = student / term.student_temperature
        if isinstance(targets, Tensor):
            teacher = targets[keep_T].double()
            if term.divergence == "taid":  # the target is on the way from student to teacher
                teacher = (1 - term.taid_t) * student.detach() + term.taid_t * teacher
            teacher = teacher / term.temperature
            kd = dense(tempered, teacher, labels, term) * term.scale
            log_p = teacher.log_softmax(-1)
            entropy_T.append(spread(-_expect(log_p.exp(), log_p)))
        else:
            kd = sparse(tempered, targets.ids_TK[keep_T], targets.log_probs_TK[keep_T], labels, term) * term.scale
            entropy_T.append(None)
        loss = loss + weighted(weight_T, kd)
        kd_T.append(spread(kd))
    gradients = torch.autograd.grad(loss, inputs) if keep_T.any() else tuple(torch.zeros_like(x) for x in inputs)
    return Twin(loss.detach(), spread(lm), kd_T, entropy_T, gradients)


def head_twin(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    lm_weight_T: Tensor,
    terms: list[tuple[Any, Any, Tensor]],
    *,
    vocab_size: int,
    z_weight_T: Tensor | None = None,
) -> Twin:
    """Loss and gradients from hidden states and whole output weights, padding rows included.

    terms: (term, (teacher's hidden states, its whole weight) or sparse targets, weights).
    """
    hidden_TH, weight_VH = (x.detach().double().requires_grad_() for x in (hidden_TH, weight_VH))
    student_TV = hidden_TH @ weight_VH[:vocab_size].t()

    def teacher(targets: Any) -> Any:
        if not isinstance(targets, tuple):
            return targets
        return targets[0].double() @ targets[1][:vocab_size].double().t()

    made = [(term, teacher(targets), weight_T) for term, targets, weight_T in terms]
    return logits_twin(student_TV, labels_T, lm_weight_T, made, z_weight_T=z_weight_T, inputs=(hidden_TH, weight_VH))

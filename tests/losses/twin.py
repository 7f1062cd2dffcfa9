"""The slow obvious twin of every loss on the output head: float64, whole vocabulary, one process, autograd.

Nothing here is shared with the code under test. If the two disagree, suspect the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _expect(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p · x over the vocabulary, where an entry without mass adds nothing; detached from what it leaves out."""
    return torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0).sum(-1)


def soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -_expect(log_p.exp(), log_q)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _expect(log_p.exp(), log_p) - _expect(log_p.exp(), log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return forward_kl(log_q, log_p)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft_cross_entropy": soft_cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
}


@dataclass(frozen=True)
class Twin:
    loss: Tensor
    lm_T: Tensor
    kd_T: Tensor
    entropy_T: Tensor
    gradients: tuple[Tensor, ...]


def logits_twin(
    student_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    lm_weight_T: Tensor,
    kd_weight_T: Tensor,
    *,
    divergence: str,
    student_temperature: float,
    teacher_temperature: float,
    scale: float,
    inputs: tuple[Tensor, ...] | None = None,
) -> Twin:
    """Loss and its gradient by ``inputs`` (the student's logits, unless given) from logits of the true vocabulary."""
    if inputs is None:
        student_TV = student_TV.detach().double().requires_grad_()
        inputs = (student_TV,)
    keep_T = (lm_weight_T != 0) | (kd_weight_T != 0)
    student, teacher = student_TV[keep_T].double(), teacher_TV[keep_T].double()
    log_q1 = student.log_softmax(-1)
    labels, has_lm = labels_T[keep_T], lm_weight_T[keep_T] != 0
    lm = -log_q1.gather(1, labels.clamp(0, student_TV.shape[1] - 1)[:, None])[:, 0]
    log_q = (student / student_temperature).log_softmax(-1)
    log_p = (teacher / teacher_temperature).log_softmax(-1)
    kd = scale * DIVERGENCES[divergence](log_p, log_q)
    has_kd = kd_weight_T[keep_T] != 0
    loss = (lm_weight_T[keep_T].double() * lm)[has_lm].sum() + (kd_weight_T[keep_T].double() * kd)[has_kd].sum()
    gradients = torch.autograd.grad(loss, inputs) if keep_T.any() else tuple(torch.zeros_like(x) for x in inputs)

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(keep_T.shape, dtype=torch.float64).index_put((keep_T,), values.detach())

    entropy = -_expect(log_p.exp(), log_p)
    return Twin(loss.detach(), spread(lm), spread(kd), spread(entropy), gradients)


def head_twin(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    teacher_hidden_TH: Tensor,
    teacher_weight_VH: Tensor,
    *args: Tensor,
    vocab_size: int,
    **options: float | str,
) -> Twin:
    """The same from hidden states and whole output weights, padding rows included; gradients by both."""
    hidden_TH, weight_VH = (x.detach().double().requires_grad_() for x in (hidden_TH, weight_VH))
    student_TV = hidden_TH @ weight_VH[:vocab_size].t()
    teacher_TV = teacher_hidden_TH.double() @ teacher_weight_VH[:vocab_size].double().t()
    return logits_twin(student_TV, teacher_TV, *args, inputs=(hidden_TH, weight_VH), **options)  # type: ignore[arg-type]

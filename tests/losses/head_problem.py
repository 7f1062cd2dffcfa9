"""A small problem for the head, run on the ranks of a world and compared with its float64 twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from losses.twin import Twin, head_twin
from torch import Tensor

from megakd.losses.head import HeadOutput, KDTerm, VocabShard, head_loss
from megakd.targets import DenseTargets

TERMS = [
    KDTerm(),
    KDTerm(temperature=2.0),
    KDTerm(temperature=2.0, scale_by_temperature_squared=False),
    KDTerm("soft_cross_entropy", temperature=0.5, temperature_on="teacher"),
    KDTerm("reverse_kl", temperature=2.0),
]


@dataclass(frozen=True)
class Problem:
    """Whole-vocabulary inputs of a head, padding rows included."""

    hidden_TH: Tensor
    weight_VH: Tensor
    teacher_hidden_TH: Tensor
    teacher_weight_VH: Tensor
    labels_T: Tensor
    lm_weight_T: Tensor
    kd_weight_T: Tensor
    vocab_size: int = 251

    @staticmethod
    def make(dtype: torch.dtype = torch.float32, num_tokens: int = 7, seed: int = 0, padded_size: int = 256) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        weight_VH, teacher_weight_VH = normal(padded_size, 13), normal(padded_size, 5)
        weight_VH[251:], teacher_weight_VH[251:] = 1e4, -1e4  # a leak of padding into a softmax would be seen
        lm_weight_T, kd_weight_T = (torch.rand(num_tokens, generator=generator) for _ in range(2))
        lm_weight_T[1], kd_weight_T[2] = 0.0, 0.0  # one term alone
        if num_tokens > 4:
            lm_weight_T[4] = kd_weight_T[4] = 0.0  # a masked token
        labels_T = torch.randint(0, 251, (num_tokens,), generator=generator)
        return Problem(
            normal(num_tokens, 13),
            weight_VH,
            normal(num_tokens, 5),
            teacher_weight_VH,
            labels_T,
            lm_weight_T,
            kd_weight_T,
        )

    def twin(self, term: KDTerm) -> Twin:
        return head_twin(
            self.hidden_TH,
            self.weight_VH,
            self.teacher_hidden_TH,
            self.teacher_weight_VH,
            self.labels_T,
            self.lm_weight_T,
            self.kd_weight_T,
            vocab_size=self.vocab_size,
            divergence=term.divergence,
            student_temperature=term.student_temperature,
            teacher_temperature=term.temperature,
            scale=term.scale,
        )


@dataclass(frozen=True)
class Result:
    """One rank's answer: everything detached, and the gradients of ``3 * loss``."""

    output: HeadOutput
    d_hidden_TH: Tensor
    d_weight_vH: Tensor


def run_head(problem: Problem, kd: KDTerm | None, *, grad: bool = True, **options: Any) -> Result:
    """This rank's part of the problem through the head, forward and backward. Runs on every rank of a world."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_rows = problem.weight_VH.shape[0] // size
    rows = slice(rank * num_rows, (rank + 1) * num_rows)
    group = dist.group.WORLD if size > 1 else None
    hidden_TH = problem.hidden_TH.clone().requires_grad_(grad)
    weight_vH = problem.weight_VH[rows].clone().requires_grad_(grad)
    output = head_loss(
        hidden_TH,
        weight_vH,
        problem.labels_T,
        shard=VocabShard(rows.start, num_rows, problem.vocab_size, group),
        lm_weight_T=problem.lm_weight_T,
        kd_weight_T=problem.kd_weight_T if kd else None,
        kd=kd,
        targets=DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH[rows]) if kd else None,
        **options,
    )
    if not grad:
        return Result(output, torch.zeros(()), torch.zeros(()))
    (3 * output.loss).backward()
    assert hidden_TH.grad is not None and weight_vH.grad is not None
    assert hidden_TH.grad.dtype == hidden_TH.dtype and weight_vH.grad.dtype == weight_vH.dtype
    return Result(replace(output, loss=output.loss.detach()), hidden_TH.grad, weight_vH.grad)


def chunk_budget(problem: Problem, size: int, tokens: int) -> int:
    """A budget for this many tokens a chunk."""
    return tokens * 2 * problem.hidden_TH.element_size() * (problem.weight_VH.shape[0] // size)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def twin_errors(results: list[Result], twin: Twin) -> dict[str, float]:
    """How far a world is from the twin, after checking that its ranks agree bit for bit."""
    first = results[0]
    assert first.output.kd_T is not None and first.output.entropy_T is not None
    for other in results[1:]:
        assert other.output.kd_T is not None
        assert torch.equal(other.output.loss, first.output.loss)
        assert torch.equal(other.output.lm_T, first.output.lm_T)
        assert torch.equal(other.output.kd_T, first.output.kd_T)
        assert torch.equal(other.d_hidden_TH, first.d_hidden_TH)
    return {
        "loss": relative_error(first.output.loss, twin.loss),
        "lm": relative_error(first.output.lm_T, twin.lm_T),
        "kd": relative_error(first.output.kd_T, twin.kd_T),
        "entropy": relative_error(first.output.entropy_T, twin.entropy_T),
        "d_hidden": relative_error(first.d_hidden_TH, 3 * twin.gradients[0]),
        "d_weight": relative_error(torch.cat([r.d_weight_vH for r in results]), 3 * twin.gradients[1]),
    }

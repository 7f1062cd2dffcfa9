"""A small problem for the head, run on the ranks of a world and compared with its float64 twin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from losses.cases import Case, sparse_targets
from losses.twin import Twin, head_twin
from torch import Tensor

from megakd.losses.head import KD, HeadOutput, KDTerm, VocabShard, head_loss
from megakd.targets import DenseTargets, SparseTargets

FORWARD = Case(KDTerm(), "dense")


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
    z_weight_T: Tensor | None = None
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

    def sparse(self, kind: str) -> SparseTargets:
        teacher_TV = self.teacher_hidden_TH.double() @ self.teacher_weight_VH[: self.vocab_size].double().t()
        return sparse_targets(kind, teacher_TV)

    def twin(self, *cases: Case) -> Twin:
        dense = (self.teacher_hidden_TH, self.teacher_weight_VH)
        return head_twin(
            self.hidden_TH,
            self.weight_VH,
            self.labels_T,
            self.lm_weight_T,
            [(c.term, dense if c.kind == "dense" else self.sparse(c.kind), self.kd_weight_T) for c in cases],
            z_weight_T=self.z_weight_T,
            vocab_size=self.vocab_size,
        )


@dataclass(frozen=True)
class Result:
    """One rank's answer: everything detached, and the gradients of ``3 * loss``."""

    output: HeadOutput
    d_hidden_TH: Tensor
    d_weight_vH: Tensor


def run_head(problem: Problem, *cases: Case, grad: bool = True, **options: Any) -> Result:
    """This rank's part of the problem through the head, forward and backward. Runs on every rank of a world."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_rows = problem.weight_VH.shape[0] // size
    rows = slice(rank * num_rows, (rank + 1) * num_rows)
    group = dist.group.WORLD if size > 1 else None
    hidden_TH = problem.hidden_TH.clone().requires_grad_(grad)
    weight_vH = problem.weight_VH[rows].clone().requires_grad_(grad)
    dense = DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH[rows])
    output = head_loss(
        hidden_TH,
        weight_vH,
        problem.labels_T,
        shard=VocabShard(rows.start, num_rows, problem.vocab_size, group),
        lm_weight_T=problem.lm_weight_T,
        z_weight_T=problem.z_weight_T,
        kd=[KD(c.term, dense if c.kind == "dense" else problem.sparse(c.kind), problem.kd_weight_T) for c in cases],
        **options,
    )
    if not grad:
        return Result(output, torch.zeros(()), torch.zeros(()))
    (3 * output.loss).backward()
    assert hidden_TH.grad is not None and weight_vH.grad is not None
    assert hidden_TH.grad.dtype == hidden_TH.dtype and weight_vH.grad.dtype == weight_vH.dtype
    return Result(replace(output, loss=output.loss.detach()), hidden_TH.grad, weight_vH.grad)


def run_cases(problem: Problem, cases: list[Case], chunk_tokens: int, implementation: str) -> list[Result]:
    """Every case by itself. Runs on every rank of a world."""
    budget = chunk_budget(problem, dist.get_world_size(), chunk_tokens)
    return [run_head(problem, case, implementation=implementation, chunk_bytes=budget) for case in cases]


def chunk_budget(problem: Problem, size: int, tokens: int) -> int:
    """A budget for this many tokens a chunk, with a dense teacher; split ranks keep two chunks."""
    copies = 2 if size == 1 else 4
    return tokens * copies * problem.hidden_TH.element_size() * (problem.weight_VH.shape[0] // size)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def twin_errors(results: list[Result], twin: Twin) -> dict[str, float]:
    """Errors of a world against the twin, after checking that its ranks agree bit for bit."""
    first = results[0]
    for other in results[1:]:
        assert torch.equal(other.output.loss, first.output.loss)
        assert torch.equal(other.output.lm_T, first.output.lm_T)
        assert all(torch.equal(a.value_T, b.value_T) for a, b in zip(other.output.kd, first.output.kd))
        assert torch.equal(other.d_hidden_TH, first.d_hidden_TH)
    errors = {
        "loss": relative_error(first.output.loss, twin.loss),
        "lm": relative_error(first.output.lm_T, twin.lm_T),
        "d_hidden": relative_error(first.d_hidden_TH, 3 * twin.gradients[0]),
        "d_weight": relative_error(torch.cat([r.d_weight_vH for r in results]), 3 * twin.gradients[1]),
    }
    for index, (found, kd_T, entropy_T) in enumerate(zip(first.output.kd, twin.kd_T, twin.entropy_T)):
        errors[f"kd{index}"] = relative_error(found.value_T, kd_T)
        if entropy_T is not None:
            assert found.entropy_T is not None
            errors[f"entropy{index}"] = relative_error(found.entropy_T, entropy_T)
    return errors

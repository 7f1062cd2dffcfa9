"""The inputs that bench_loss.py times losses on, and float64's word on the gradients that come out.

Axes: ``T`` tokens, ``H`` hidden, ``V`` vocabulary, ``v`` this rank's slice of it, ``K`` kept ids, ``R`` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megakd.losses.vocab_parallel import VocabShard
from megakd.targets import DenseTargets, SparseTargets

HIDDEN, TEACHER_HIDDEN, KEPT_IDS = 512, 1024, 100
LM, DISTIL = 0.5, 0.5
"""Weights of the two losses on a head."""

_DISTINCT_ROWS, _CHECKED_ROWS, _CHECKED_IDS = 64, 16, 64


@dataclass(frozen=True)
class Problem:
    """Size of a problem and this rank's part. megatron_training: a folder with an unpacked megatron-core 0.19."""

    tokens: int
    vocab: int
    device: str
    rank: int = 0
    world: int = 1
    megatron_training: str | None = None

    @property
    def shard(self) -> VocabShard:
        slice_size = self.vocab // self.world
        group = dist.group.WORLD if self.world > 1 else None
        return VocabShard(self.rank * slice_size, slice_size, self.vocab, group)


@dataclass(frozen=True)
class HeadInputs:
    """bf16 hidden states and output weights of both models; logits have a standard deviation of 2."""

    hidden_TH: Tensor
    weight_VH: Tensor
    teacher: DenseTargets
    labels_T: Tensor

    @staticmethod
    def make(problem: Problem) -> HeadInputs:
        random = torch.Generator(problem.device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            drawn = torch.randn(rows, columns, generator=random, device=problem.device, dtype=torch.bfloat16)
            return drawn.mul_(scale)

        return HeadInputs(
            normal(problem.tokens, HIDDEN, 0.5).requires_grad_(),
            normal(problem.vocab, HIDDEN, 4 / HIDDEN**0.5).requires_grad_(),
            DenseTargets(
                normal(problem.tokens, TEACHER_HIDDEN, 0.5),
                normal(problem.vocab, TEACHER_HIDDEN, 4 / TEACHER_HIDDEN**0.5),
            ),
            torch.randint(0, problem.vocab, (problem.tokens,), generator=random, device=problem.device),
        )

    def fresh(self) -> HeadInputs:
        self.hidden_TH.grad = self.weight_VH.grad = None
        return self

    def error(self, problem: Problem) -> float:
        """Size of dHidden's or dWeight's difference from float64, over what rounding logits to bf16 explains."""
        weight_VH, teacher = self.weight_VH.detach(), self.teacher
        student_TV = _product_fp64(self.hidden_TH.detach(), weight_VH).requires_grad_()
        teacher_TV = _product_fp64(teacher.hidden_TH, teacher.weight_vH)
        loss = LM * functional.cross_entropy(student_TV, self.labels_T) + DISTIL * forward_kl(student_TV, teacher_TV)
        (slope_TV,) = torch.autograd.grad(loss, student_TV)
        pieces = zip(slope_TV.split(16384, 1), weight_VH.split(16384))
        d_hidden_TH = sum(slope_Tv @ weight_vH.double() for slope_Tv, weight_vH in pieces)
        ids = torch.cat([self.labels_T, torch.arange(min(_CHECKED_IDS, problem.vocab), device=problem.device)])
        d_weight_RH = slope_TV[:, ids].t() @ self.hidden_TH.detach().double()
        found = (self.hidden_TH.grad, d_hidden_TH), (self.weight_VH.grad[ids], d_weight_RH)
        shares = [(own.double() - right).norm() / right.norm() for own, right in found]
        return float(torch.stack(shares).max()) / 2**-5  # a NaN wins


@dataclass
class LogitInputs:
    """Logits of both models ``[T, v]``, bf16, and the teacher's best ids. Few rows are distinct, so that they are made
    fast; all of them are in memory."""

    student_Tv: Tensor
    teacher_Tv: Tensor | None
    sparse: SparseTargets
    labels_T: Tensor
    distinct: tuple[Tensor, Tensor]
    gradient_Tv: Tensor | None = None

    def logits(self) -> Tensor:
        """The student's logits as the output of a layer that takes their gradient."""
        anchor = torch.zeros((), device=self.student_Tv.device, requires_grad=True)
        made: Tensor = _Layer.apply(anchor, self)
        return made

    def error(self, problem: Problem) -> float:
        """Largest difference of the gradient from float64 over what rounding to bf16 explains, in some rows."""
        assert self.gradient_Tv is not None
        rows = torch.linspace(0, problem.tokens - 1, _CHECKED_ROWS, device=problem.device).long()
        student_RV, teacher_RV = (logits_RV[rows % _DISTINCT_ROWS].double() for logits_RV in self.distinct)
        student_RV.requires_grad_()
        if self.teacher_Tv is None:
            ids_RK, log_p_RK = self.sparse.ids_TK[rows], self.sparse.log_probs_TK[rows].double()
            loss = _ghost_kl(student_RV, ids_RK, log_p_RK)
        else:
            loss = forward_kl(student_RV, teacher_RV)
        (right_RV,) = torch.autograd.grad(loss * len(rows) / problem.tokens, student_RV)
        start, stop = problem.shard.start, problem.shard.start + problem.shard.num_rows
        right_Rv = right_RV[:, start:stop]
        allowed_Rv = right_Rv.abs() * 2**-8 + right_RV.abs().amax(1, keepdim=True) * 1e-5
        return float(((self.gradient_Tv[rows].double() - right_Rv).abs() / allowed_Rv).max())


def head_inputs(problem: Problem) -> Callable[[], HeadInputs]:
    return HeadInputs.make(problem).fresh


def logit_inputs(problem: Problem, *, with_teacher: bool = True) -> Callable[[], LogitInputs]:
    """Return a function that makes fresh inputs, which no case has overwritten."""
    random = torch.Generator(problem.device).manual_seed(0)
    size = (_DISTINCT_ROWS, problem.vocab)
    teacher_RV = torch.randn(size, generator=random, device=problem.device).mul_(2)
    teacher_RV[:, :64] += 6  # a teacher that is sure of few ids, and a student that is near it
    student_RV = torch.randn(size, generator=random, device=problem.device).add_(teacher_RV).bfloat16()
    teacher_RV = teacher_RV.bfloat16()
    best = teacher_RV.float().log_softmax(-1).topk(min(KEPT_IDS, problem.vocab), dim=-1)
    labels_T = torch.zeros(problem.tokens, dtype=torch.int64, device=problem.device)
    own = slice(problem.shard.start, problem.shard.start + problem.shard.num_rows)

    def all_rows(distinct_RX: Tensor) -> Tensor:
        rows_TX = distinct_RX.new_empty(problem.tokens, distinct_RX.shape[1])
        for part in rows_TX.split(_DISTINCT_ROWS):
            part.copy_(distinct_RX[: part.shape[0]])
        return rows_TX

    sparse = SparseTargets(all_rows(best.indices), all_rows(best.values))
    return lambda: LogitInputs(
        all_rows(student_RV[:, own]),
        all_rows(teacher_RV[:, own]) if with_teacher else None,
        sparse,
        labels_T,
        (student_RV, teacher_RV),
    )


def sparse_inputs(problem: Problem) -> Callable[[], LogitInputs]:
    """Inputs without the teacher's logits."""
    return logit_inputs(problem, with_teacher=False)


def no_inputs(_: Problem) -> Callable[[], None]:
    return lambda: None


class _Layer(torch.autograd.Function):
    """Stand-in for the layer that made the logits; copies nothing, forward or backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inputs: LogitInputs) -> Tensor:
        ctx.inputs = inputs
        made_Tv = inputs.student_Tv.new_empty(0)
        return made_Tv.set_(inputs.student_Tv)  # autograd refuses to see views of inputs overwritten

    @staticmethod
    def backward(ctx: Any, gradient_Tv: Tensor) -> tuple[Tensor, None]:
        ctx.inputs.gradient_Tv = gradient_Tv
        return torch.zeros((), device=gradient_Tv.device), None


def _product_fp64(hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
    return torch.cat([hidden_RH.double() @ part_vH.double().t() for part_vH in weight_VH.split(16384)], 1)


def _ghost_kl(student_RV: Tensor, ids_RK: Tensor, log_p_RK: Tensor) -> Tensor:
    """Forward KL over the kept ids and one bucket for all others."""
    log_q_RV = student_RV.log_softmax(-1)
    is_kept_RV = torch.zeros_like(student_RV, dtype=torch.bool).scatter_(1, ids_RK, True)
    log_q_rest_R = log_q_RV.masked_fill(is_kept_RV, -torch.inf).logsumexp(-1, keepdim=True)
    log_p_rest_R = (1 - log_p_RK.exp().sum(-1, keepdim=True)).log()
    log_p, log_q = torch.cat([log_p_RK, log_p_rest_R], -1), torch.cat([log_q_RV.gather(1, ids_RK), log_q_rest_R], -1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def forward_kl(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
    log_q, log_p = functional.log_softmax(student_TV, -1), functional.log_softmax(teacher_TV, -1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()

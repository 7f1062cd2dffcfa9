"""Losses from logits that exist: in place or not, masked or not, whole or split."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from losses.cases import CASES, Case, sparse_targets
from losses.twin import logits_twin
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.head import KD, HeadOutput, KDTerm, VocabShard
from megakd.losses.logits import logits_loss
from megakd.targets import LogitTargets

SHORT = [case for case in CASES if case.term.temperature in (1.0, 0.5)]


def _problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = ((torch.randn(7, 256, generator=generator) * 3).to(dtype) for _ in range(2))
    student[:, 251:] = teacher[:, 251:] = torch.nan
    labels = torch.randint(0, 251, (7,), generator=generator)
    lm_weight, kd_weight = (torch.rand(7, generator=generator) for _ in range(2))
    lm_weight[4] = kd_weight[4] = 0.0
    return student, teacher, labels, lm_weight, kd_weight


def _run(case: Case, dtype: torch.dtype, *, inplace: bool, all_tokens: bool) -> tuple[HeadOutput, Tensor]:
    student, teacher, labels, lm_weight, kd_weight = _problem(dtype)
    if all_tokens:
        lm_weight[4] = 0.5
    size = dist.get_world_size() if dist.is_initialized() else 1
    start = (256 // size) * (dist.get_rank() if size > 1 else 0)
    own = slice(start, start + 256 // size)
    targets = LogitTargets(teacher[:, own].contiguous())
    sparse = None if case.kind == "dense" else sparse_targets(case.kind, teacher[:, :251])
    leaf = student[:, own].contiguous().requires_grad_()
    made = leaf * 1.0  # as a product would: its backward does not look at it
    output = logits_loss(
        made,
        labels,
        shard=VocabShard(start, 256 // size, 251, dist.group.WORLD if size > 1 else None),
        lm_weight_T=lm_weight,
        kd=[KD(case.term, sparse or targets, kd_weight)],
        inplace=inplace,
        chunk_bytes=3 * 256 * student.element_size(),
    )
    (2 * output.loss).backward()
    assert leaf.grad is not None
    return HeadOutput(output.loss.detach(), output.lm_T, output.log_z_T, output.kd), leaf.grad


def _run_all(inplace: bool, all_tokens: bool) -> list[tuple[HeadOutput, Tensor]]:
    return [_run(case, torch.float32, inplace=inplace, all_tokens=all_tokens) for case in SHORT]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_logits_equal_the_twin(world: Worlds, size: int, inplace: bool, all_tokens: bool) -> None:
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    if all_tokens:
        lm_weight[4] = 0.5
    answers = world(size).run(_run_all, inplace, all_tokens)
    for index, case in enumerate(SHORT):
        targets = teacher[:, :251] if case.kind == "dense" else sparse_targets(case.kind, teacher[:, :251])
        twin = logits_twin(student[:, :251], labels, lm_weight, [(case.term, targets, kd_weight)])
        output, _ = answers[0][index]
        gradient = torch.cat([answer[index][1] for answer in answers], 1)
        assert gradient[:, 251:].count_nonzero() == 0
        assert abs(output.loss - twin.loss) <= 1e-5 * twin.loss.abs()
        expected = 2 * twin.gradients[0]
        assert (gradient[:, :251] - expected).abs().max() <= 1e-5 * expected.abs().max(), case


def test_in_place_overwrites_and_otherwise_leaves_alone() -> None:
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    for inplace in (False, True):
        made = (student.clone().requires_grad_()) * 1.0
        output = logits_loss(
            made,
            labels,
            shard=VocabShard(0, 256, 251, None),
            lm_weight_T=lm_weight,
            kd=[KD(KDTerm(), LogitTargets(teacher), kd_weight)],
            inplace=inplace,
        )
        assert torch.equal(made.nan_to_num(), student.nan_to_num()) != inplace
        output.loss.backward()


def test_in_place_is_refused_where_the_logits_are_needed() -> None:
    """exp keeps its output for its backward: autograd finds that it was overwritten."""
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    made = student.nan_to_num().requires_grad_().exp()
    loss = logits_loss(
        made,
        labels,
        shard=VocabShard(0, 256, 251, None),
        lm_weight_T=lm_weight,
        kd=[KD(KDTerm(), LogitTargets(teacher), kd_weight)],
        inplace=True,
    ).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_backward_is_refused() -> None:
    student, _, labels, lm_weight, _ = _problem(torch.float32)
    made = student.clone().requires_grad_()
    loss = logits_loss(made, labels, shard=VocabShard(0, 256, 251, None), lm_weight_T=lm_weight).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_values_alone_change_nothing() -> None:
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    before = student.clone(), teacher.clone()
    for case in SHORT:
        targets = LogitTargets(teacher) if case.kind == "dense" else sparse_targets(case.kind, teacher[:, :251])
        logits_loss(
            student,
            labels,
            shard=VocabShard(0, 256, 251, None),
            lm_weight_T=lm_weight,
            kd=[KD(case.term, targets, kd_weight)],
            inplace=True,
        )
    assert torch.equal(student.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(teacher.nan_to_num(), before[1].nan_to_num())


def test_wrong_shapes_are_refused() -> None:
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    shard = VocabShard(0, 256, 251, None)
    with pytest.raises(UsageError, match=r"student_Tv has shape \(7, 250\)"):
        logits_loss(student[:, :250], labels, shard=shard, lm_weight_T=lm_weight)
    with pytest.raises(UsageError, match=r"targets.logits_Tv has shape \(7, 251\)"):
        targets = LogitTargets(teacher[:, :251])
        logits_loss(student, labels, shard=shard, lm_weight_T=lm_weight, kd=[KD(KDTerm(), targets, kd_weight)])
    with pytest.raises(UsageError, match=r"lm_weight_T has shape \(6,\)"):
        logits_loss(student, labels, shard=shard, lm_weight_T=lm_weight[:6])

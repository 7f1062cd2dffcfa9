"""Losses on logits that exist: the example, in place or not, masked or not, whole or split."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.distributed as dist
from losses.cases import CASES, DENSE, SPARSE, Case, sparse_targets
from losses.twin import logits_twin
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.head import KD, HeadOutput, KDTerm, VocabShard
from megakd.losses.kernels.choose import Implementation
from megakd.losses.logits import logits_loss
from megakd.targets import LogitTargets, SparseTargets


def test_the_example_of_the_docstring_runs() -> None:
    (example,) = doctest.DocTestFinder().find(logits_loss, "logits_loss", globs={})
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples))


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


@pytest.mark.slow
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


EXTREME = [c for c in DENSE if c.term.temperature == 1 and min(c.term.ab_alpha, c.term.ab_beta) >= 0]
EXTREME += [c for c in SPARSE if c.term.temperature == 1 and min(c.term.ab_alpha, c.term.ab_beta) >= 0]


def _extreme_problem(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of 1e4 either way, or a range of ids that both models rule out; weights with a masked token."""
    student, teacher, labels, _, weight = _problem(torch.float32)
    labels = labels % 20 + 150
    if kind == "huge":
        student[:, :251] += 1e4
        teacher[:, :251] -= 1e4
        student[:, 30:60], teacher[:, 40:70] = -1e4, -3e4
    else:
        student[:, 20:140] = teacher[:, 20:140] = -torch.inf
        student[4], teacher[4] = -torch.inf, torch.nan  # the masked token: nothing of it may be seen
    return student, teacher, labels, weight


def _run_extreme(kind: str, implementation: Implementation) -> list[tuple[Tensor, Tensor]]:
    student, teacher, labels, weight = _extreme_problem(kind)
    size = dist.get_world_size()
    rows = 256 // size
    own = slice(rows * dist.get_rank(), rows * (dist.get_rank() + 1))
    results = []
    for case in EXTREME:
        made = student[:, own].clone().requires_grad_()
        dense = LogitTargets(teacher[:, own].contiguous())
        output = logits_loss(
            made,
            labels,
            shard=VocabShard(own.start, rows, 251, dist.group.WORLD if size > 1 else None),
            lm_weight_T=weight,
            kd=[KD(case.term, dense if case.kind == "dense" else _extreme_sparse(case, teacher), weight)],
            implementation=implementation,
        )
        output.loss.backward()
        assert made.grad is not None
        results.append((output.kd[0].value_T, made.grad))
    return results


def _extreme_sparse(case: Case, teacher: Tensor) -> SparseTargets:
    finite = torch.where(teacher[:, :251].isfinite(), teacher[:, :251], -50.0)
    return sparse_targets(case.kind, finite - finite.amax(1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["huge", "ruled_out"])
@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_extreme_logits_over_processes(world: Worlds, size: int, kind: str, implementation: Implementation) -> None:
    student, teacher, labels, weight = _extreme_problem(kind)
    there = torch.ones(251, dtype=torch.bool)
    if kind == "ruled_out":
        there[20:140] = False
    answers = world(size).run(_run_extreme, kind, implementation)
    wrong = []
    for index, case in enumerate(EXTREME):
        if kind == "ruled_out" and case.kind != "dense" and case.term.tail == "spread":
            continue  # a share of the tail falls on ids that the student rules out: infinite, as it should be
        targets: Tensor | SparseTargets = teacher[:, :251][:, there]
        if case.kind != "dense":
            whole = _extreme_sparse(case, teacher)
            places = there.long().cumsum(0) - 1
            listed = whole.ids_TK.clamp(max=250)
            targets = SparseTargets(torch.where(there[listed], places[listed], 10**6), whole.log_probs_TK, whole.kind)
        labels_there = labels - (120 if kind == "ruled_out" else 0)
        twin = logits_twin(student[:, :251][:, there], labels_there, weight, [(case.term, targets, weight)])
        gradient = torch.cat([answer[index][1] for answer in answers], 1)[:, :251]
        value_error = (answers[0][index][0].double() - twin.kd_T[0]).abs().max() / twin.kd_T[0].abs().max().clamp(
            min=0.1
        )
        gradient_error = (gradient[:, there] - twin.gradients[0]).abs().max() / twin.gradients[0].abs().max()
        # taid mixes the logits themselves, in fp32
        tolerance = 1e-4 if case.term.divergence == "taid" else 1e-5
        if not (value_error < tolerance and gradient_error < tolerance) or gradient[:, ~there].count_nonzero():
            wrong.append((str(case), value_error.item(), gradient_error.item()))
    assert not wrong


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


@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("all_tokens", [False, True])
def test_in_place_is_refused_where_the_logits_are_needed(implementation: Implementation, all_tokens: bool) -> None:
    """exp keeps its output for its backward: autograd finds that it was overwritten."""
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    lm_weight[4] = float(all_tokens)
    made = student.nan_to_num().requires_grad_().exp()
    loss = logits_loss(
        made,
        labels,
        shard=VocabShard(0, 256, 251, None),
        lm_weight_T=lm_weight,
        kd=[KD(KDTerm(), LogitTargets(teacher), kd_weight)],
        inplace=True,
        implementation=implementation,
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


def test_a_slice_of_columns_is_as_good_as_a_copy() -> None:
    """A rank's part of whole logits is not contiguous: its chunks are copied, and native does them all the same."""
    student, teacher, labels, lm_weight, kd_weight = _problem(torch.float32)
    lm_weight[4] = 0.5
    shard = VocabShard(0, 128, 251, None)
    results = []
    for own in (teacher[:, :128], teacher[:, :128].contiguous()):
        made = student[:, :128].clone().requires_grad_()
        loss = logits_loss(
            made,
            labels % 128,
            shard=shard,
            lm_weight_T=lm_weight,
            kd=[KD(KDTerm(), LogitTargets(own), kd_weight)],
            implementation="native",
        ).loss
        loss.backward()
        results.append((loss.detach(), made.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])


def test_the_incoming_gradient_is_not_rounded() -> None:
    """A third in bf16 is a fifth of a per cent off: it is multiplied in as it is."""
    student, _, labels, lm_weight, _ = _problem(torch.bfloat16)
    gradients = []
    for factor in (1.0, 1 / 3):
        made = student.clone().requires_grad_()
        loss = logits_loss(made, labels, shard=VocabShard(0, 256, 251, None), lm_weight_T=lm_weight).loss
        (factor * loss).backward()
        assert made.grad is not None
        gradients.append(made.grad.double())
    norm = gradients[1].norm() / gradients[0].norm()
    assert abs(norm * 3 - 1) < 5e-4

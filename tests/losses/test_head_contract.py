"""Promises of the head besides its values: masks, evaluation, gradients only where wanted, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses.cases import UNSCALED, Case
from losses.head_problem import FORWARD, Problem, relative_error, run_head
from marks import fast_one_in
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses import logit_sources
from megakd.losses.head import KD, KDTerm, VocabShard, head_loss
from megakd.losses.kernels import choose as implementations
from megakd.targets import DenseTargets

MASKED = [
    Case(KDTerm(name), "dense")
    for name in ("forward_kl", "reverse_kl", "generalised_jsd", "adaptive_kl", "centred_logit_mse", "decoupled")
] + [Case(KDTerm(tail="ghost"), "top_p_k"), Case(KDTerm(tail="spread"), "top_p_k")]


@pytest.mark.parametrize("size", [1, 2])
def test_no_token_with_weight(world: Worlds, size: int) -> None:
    problem = Problem.make()
    none = torch.zeros_like(problem.lm_weight_T)
    for result in world(size).run(run_head, replace(problem, lm_weight_T=none, kd_weight_T=none), FORWARD):
        assert result.output.loss == 0
        assert result.output.lm_T.count_nonzero() == result.d_hidden_TH.count_nonzero() == 0
        assert result.d_weight_vH.count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_a_masked_token_changes_nothing(implementation: str, what: float, case: Case) -> None:
    problem = Problem.make()
    hidden_TH, teacher_hidden_TH, labels_T = (
        x.clone() for x in (problem.hidden_TH, problem.teacher_hidden_TH, problem.labels_T)
    )
    hidden_TH[4], teacher_hidden_TH[4], labels_T[4] = what, what, -100
    if case.kind == "dense":
        teacher_hidden_TH[2] = what  # its KD weight is 0
    poisoned = replace(problem, hidden_TH=hidden_TH, teacher_hidden_TH=teacher_hidden_TH, labels_T=labels_T)
    clean, dirty = (run_head(p, case, implementation=implementation) for p in (problem, poisoned))
    assert torch.equal(clean.output.loss, dirty.output.loss)
    assert torch.equal(clean.output.lm_T, dirty.output.lm_T)
    assert torch.equal(clean.d_hidden_TH, dirty.d_hidden_TH)
    assert torch.equal(clean.d_weight_vH, dirty.d_weight_vH)
    assert clean.d_hidden_TH[4].count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("case", MASKED, ids=str)
def test_elsewhere_it_shows(implementation: str, case: Case) -> None:
    problem = Problem.make()
    problem.hidden_TH[3, 0] = math.nan
    output = run_head(problem, case, implementation=implementation).output
    assert output.loss.isnan()
    assert (~output.lm_T.isfinite()).nonzero().squeeze(1).tolist() == [3]
    assert (~output.kd[0].value_T.isfinite()).nonzero().squeeze(1).tolist() == [3]
    if case.kind == "dense":
        problem = Problem.make()
        problem.teacher_hidden_TH[3, 0] = math.inf
        output = run_head(problem, case, implementation=implementation).output
        assert not output.loss.isfinite() and output.lm_T.isfinite().all()
        assert (~output.kd[0].value_T.isfinite()).nonzero().squeeze(1).tolist() == [3]


# A weight that is held fixed in the derivative, or a target made of the student: the loss is no function of its inputs
# alone, so finite differences see another gradient. Those are compared with their twins in test_head.py.
DETACHED = ("adaptive_kl", "taid")
CHECKED = [case for case in UNSCALED if case.term.divergence not in DETACHED]


@pytest.mark.parametrize("case", fast_one_in(11, CHECKED), ids=str)
def test_gradcheck(case: Case) -> None:
    problem = Problem.make(torch.float64, num_tokens=3)
    shard = VocabShard(0, 256, 251, None)
    targets: Any = DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH)
    if case.kind != "dense":
        targets = problem.sparse(case.kind)

    def loss(hidden_TH: Tensor, weight_vH: Tensor) -> Tensor:
        return head_loss(
            hidden_TH,
            weight_vH,
            problem.labels_T,
            shard=shard,
            lm_weight_T=problem.lm_weight_T,
            z_weight_T=problem.lm_weight_T,
            kd=[KD(case.term, targets, problem.kd_weight_T)],
            chunk_bytes=1,
        ).loss

    inputs = (problem.hidden_TH.requires_grad_(), problem.weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_lm_alone_equals_cross_entropy() -> None:
    problem = Problem.make()
    result = run_head(problem)
    assert result.output.kd == ()
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    lm_T = torch.nn.functional.cross_entropy(hidden_TH @ weight_VH[:251].t(), problem.labels_T, reduction="none")
    loss = (lm_T * problem.lm_weight_T).sum()
    (3 * loss).backward()
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    assert relative_error(result.output.loss, loss.detach()) < 1e-5
    assert relative_error(result.d_hidden_TH, hidden_TH.grad) < 1e-5
    assert relative_error(result.d_weight_vH, weight_VH.grad) < 1e-5


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.make()
    expected = run_head(problem, FORWARD).output

    def fail(*args: Any) -> Any:
        raise AssertionError("a gradient was made")

    for kernels in implementations.IMPLEMENTATIONS.values():
        monkeypatch.setattr(kernels, "gradient", fail, raising=False)
        monkeypatch.setattr(kernels, "statistics_and_gradient", fail, raising=False)
    monkeypatch.setattr(logit_sources, "_add_product_inplace", fail)
    frozen = run_head(problem, FORWARD, grad=False).output
    with torch.no_grad():
        problem.hidden_TH.requires_grad_()
        assert torch.equal(run_head(problem, FORWARD, grad=False).output.loss, expected.loss)
    assert torch.equal(frozen.loss, expected.loss)
    assert torch.equal(frozen.kd[0].value_T, expected.kd[0].value_T)
    assert not frozen.loss.requires_grad


def test_only_the_gradients_that_are_asked_for() -> None:
    problem = Problem.make()
    whole = run_head(problem, FORWARD)
    shard = VocabShard(0, 256, 251, None)
    for asked in (0, 1):
        inputs = [problem.hidden_TH.clone(), problem.weight_VH.clone()]
        inputs[asked].requires_grad_()
        targets = DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH)
        output = head_loss(
            inputs[0],
            inputs[1],
            problem.labels_T,
            shard=shard,
            lm_weight_T=problem.lm_weight_T,
            kd=[KD(KDTerm(), targets, problem.kd_weight_T)],
        )
        (3 * output.loss).backward()
        assert inputs[1 - asked].grad is None
        assert torch.equal(inputs[asked].grad, (whole.d_hidden_TH, whole.d_weight_vH)[asked])  # type: ignore[arg-type]


def test_weight_gradient_adds_up_over_uses_and_backward_may_run_twice() -> None:
    problem = Problem.make()
    single = run_head(problem, FORWARD)
    weight_vH = problem.weight_VH.clone().requires_grad_()
    output = head_loss(
        problem.hidden_TH,
        weight_vH,
        problem.labels_T,
        shard=VocabShard(0, 256, 251, None),
        lm_weight_T=problem.lm_weight_T,
        kd=[KD(KDTerm(), DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH), problem.kd_weight_T)],
    )
    output.loss.backward(retain_graph=True)
    (2 * output.loss).backward()
    assert weight_vH.grad is not None
    assert relative_error(weight_vH.grad, single.d_weight_vH) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_T": torch.full((7,), 251)}, "label 251 carries a weight"),
        ({"labels_T": torch.full((7,), -1)}, "label -1 carries a weight"),
        ({"labels_T": torch.zeros(6, dtype=torch.int64)}, r"labels_T has shape \(6,\), expected \(7,\)"),
        ({"hidden_TH": torch.zeros(7, 12)}, r"hidden_TH has shape \(7, 12\)"),
        ({"teacher_hidden_TH": torch.zeros(7, 6)}, r"targets.hidden_TH has shape \(7, 6\)"),
        (
            {"hidden_TH": torch.zeros(7, 13).half(), "weight_VH": torch.zeros(256, 13).half()},
            "implementation native cannot do torch.float16",
        ),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_head(replace(Problem.make(), **change), FORWARD, implementation="native")


def test_wrong_names_and_dtypes_are_refused() -> None:
    problem = Problem.make()
    with pytest.raises(UsageError, match="hidden_grad 'allreduce' is not one of all_reduce, partial"):
        run_head(problem, FORWARD, hidden_grad="allreduce")
    with pytest.raises(UsageError, match="implementation 'fast' is not one of auto"):
        run_head(problem, FORWARD, implementation="fast")
    with pytest.raises(UsageError, match=r"hidden states are torch.bfloat16 and the weight torch.float32"):
        run_head(replace(problem, hidden_TH=problem.hidden_TH.bfloat16()), FORWARD)
    narrow = replace(problem, labels_T=problem.labels_T.int())
    assert torch.equal(run_head(narrow, FORWARD).output.loss, run_head(problem, FORWARD).output.loss)

"""What the head promises besides its values: masks, evaluation, gradients only where wanted, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from losses.head_problem import TERMS, Problem, relative_error, run_head
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses import head, sweep
from megakd.losses.head import Implementation, KDTerm, VocabShard, head_loss
from megakd.targets import DenseTargets


@pytest.mark.parametrize("size", [1, 2])
def test_no_token_with_weight(world: Worlds, size: int) -> None:
    problem = Problem.make()
    none = torch.zeros_like(problem.lm_weight_T)
    for result in world(size).run(run_head, replace(problem, lm_weight_T=none, kd_weight_T=none), KDTerm()):
        assert result.output.loss == 0
        assert result.output.lm_T.count_nonzero() == result.d_hidden_TH.count_nonzero() == 0
        assert result.d_weight_vH.count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "native"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_masked_token_changes_nothing(implementation: Implementation, what: float) -> None:
    problem = Problem.make()
    hidden_TH, teacher_hidden_TH, labels_T = (
        x.clone() for x in (problem.hidden_TH, problem.teacher_hidden_TH, problem.labels_T)
    )
    hidden_TH[4], teacher_hidden_TH[4], labels_T[4] = what, what, -100
    teacher_hidden_TH[2] = what  # its KD weight is 0
    poisoned = replace(problem, hidden_TH=hidden_TH, teacher_hidden_TH=teacher_hidden_TH, labels_T=labels_T)
    clean, dirty = (run_head(p, KDTerm(), implementation=implementation) for p in (problem, poisoned))
    assert torch.equal(clean.output.loss, dirty.output.loss)
    assert torch.equal(clean.output.lm_T, dirty.output.lm_T)
    assert torch.equal(clean.d_hidden_TH, dirty.d_hidden_TH)
    assert torch.equal(clean.d_weight_vH, dirty.d_weight_vH)
    assert clean.d_hidden_TH[4].count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_elsewhere_it_shows(implementation: Implementation) -> None:
    problem = Problem.make()
    problem.hidden_TH[3, 0] = math.nan
    output = run_head(problem, KDTerm(), implementation=implementation).output
    assert output.kd_T is not None
    assert output.loss.isnan()
    assert (~output.lm_T.isfinite() | ~output.kd_T.isfinite()).nonzero().squeeze(1).tolist() == [3]


@pytest.mark.parametrize("term", TERMS, ids=str)
def test_gradcheck(term: KDTerm) -> None:
    problem = Problem.make(torch.float64, num_tokens=3)
    shard = VocabShard(0, 256, 251, None)

    def loss(hidden_TH: Tensor, weight_vH: Tensor) -> Tensor:
        return head_loss(
            hidden_TH,
            weight_vH,
            problem.labels_T,
            shard=shard,
            lm_weight_T=problem.lm_weight_T,
            kd_weight_T=problem.kd_weight_T,
            kd=term,
            targets=DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH),
            chunk_bytes=1,
        ).loss

    inputs = (problem.hidden_TH.requires_grad_(), problem.weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_lm_alone_equals_cross_entropy() -> None:
    problem = Problem.make()
    result = run_head(problem, None)
    assert result.output.kd_T is result.output.agree_T is result.output.entropy_T is None
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
    expected = run_head(problem, KDTerm()).output

    def fail(*args: Any) -> Any:
        raise AssertionError("a gradient was made")

    for kernels in head.IMPLEMENTATIONS.values():
        monkeypatch.setattr(type(kernels), "gradient", fail)
        monkeypatch.setattr(type(kernels), "statistics_and_gradient", fail)
    monkeypatch.setattr(sweep, "_add_product_inplace", fail)
    frozen = run_head(problem, KDTerm(), grad=False).output
    with torch.no_grad():
        problem.hidden_TH.requires_grad_()
        assert torch.equal(run_head(problem, KDTerm(), grad=False).output.loss, expected.loss)
    assert frozen.kd_T is not None and expected.kd_T is not None
    assert torch.equal(frozen.loss, expected.loss) and torch.equal(frozen.kd_T, expected.kd_T)
    assert not frozen.loss.requires_grad


def test_only_the_gradients_that_are_asked_for() -> None:
    problem = Problem.make()
    whole = run_head(problem, KDTerm())
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
            kd_weight_T=problem.kd_weight_T,
            kd=KDTerm(),
            targets=targets,
        )
        (3 * output.loss).backward()
        assert inputs[1 - asked].grad is None
        assert torch.equal(inputs[asked].grad, (whole.d_hidden_TH, whole.d_weight_vH)[asked])  # type: ignore[arg-type]


def test_weight_gradient_adds_up_over_uses_and_backward_may_run_twice() -> None:
    problem = Problem.make()
    single = run_head(problem, KDTerm())
    weight_vH = problem.weight_VH.clone().requires_grad_()
    output = head_loss(
        problem.hidden_TH,
        weight_vH,
        problem.labels_T,
        shard=VocabShard(0, 256, 251, None),
        lm_weight_T=problem.lm_weight_T,
        kd_weight_T=problem.kd_weight_T,
        kd=KDTerm(),
        targets=DenseTargets(problem.teacher_hidden_TH, problem.teacher_weight_VH),
    )
    output.loss.backward(retain_graph=True)
    (2 * output.loss).backward()
    assert weight_vH.grad is not None
    assert relative_error(weight_vH.grad, single.d_weight_vH) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_T": torch.full((7,), 251)}, "label 251 carries an LM weight"),
        ({"labels_T": torch.full((7,), -1)}, "label -1 carries an LM weight"),
        ({"labels_T": torch.zeros(6, dtype=torch.int64)}, r"labels_T has shape \(6,\), expected \(7,\)"),
        ({"hidden_TH": torch.zeros(7, 12)}, r"hidden_TH has shape \(7, 12\)"),
        ({"teacher_hidden_TH": torch.zeros(7, 6)}, r"targets.hidden_TH has shape \(7, 6\)"),
        (
            {"hidden_TH": torch.zeros(7, 13).half(), "weight_VH": torch.zeros(256, 13).half()},
            "native needs bf16 or fp32",
        ),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_head(replace(Problem.make(), **change), KDTerm(), implementation="native")


def test_wrong_terms_are_refused() -> None:
    with pytest.raises(UsageError, match="divergence 'kl' is not one of"):
        KDTerm("kl")
    with pytest.raises(UsageError, match="temperature is 0"):
        KDTerm(temperature=0.0)
    problem = Problem.make()
    with pytest.raises(UsageError, match="go together"):
        head_loss(
            problem.hidden_TH,
            problem.weight_VH,
            problem.labels_T,
            shard=VocabShard(0, 256, 251, None),
            lm_weight_T=problem.lm_weight_T,
            kd=KDTerm(),
        )

"""Identities between divergences, and between sparse and dense targets, that hold for any numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from losses.cases import DENSE, SPARSE, Case, sparse_targets
from torch import Tensor

from megakd.losses.head import KD, HeadOutput, VocabShard
from megakd.losses.logits import logits_loss
from megakd.losses.terms import KDTerm
from megakd.targets import LogitTargets, SparseTargets, Targets

ROWS, VOCAB = 7, 251


def _logits(seed: int, dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 2


def _run(
    term: KDTerm, student: Tensor, targets: Targets, implementation: str = "auto"
) -> tuple[HeadOutput, Tensor, Tensor]:
    """Output, values and the gradient of their sum by the logits."""
    rows = student.shape[0]
    student = student.clone().requires_grad_()
    output = logits_loss(
        student,
        torch.arange(rows) % VOCAB,
        shard=VocabShard(0, student.shape[1], student.shape[1], None),
        lm_weight_T=torch.zeros(rows),
        kd=[KD(term, targets, torch.ones(rows))],
        implementation=implementation,  # type: ignore[arg-type]
    )
    output.loss.backward()
    assert student.grad is not None
    return output, output.kd[0].value_T, student.grad


@pytest.mark.parametrize("temperature", [{}, {"temperature": 3.0}, {"temperature": 0.7, "temperature_on": "teacher"}])
def test_soft_cross_entropy_and_forward_kl_have_one_gradient(temperature: dict[str, object]) -> None:
    student, targets = _logits(1), LogitTargets(_logits(2))
    term = replace(KDTerm(), **temperature)  # type: ignore[arg-type]
    output, kl, kl_gradient = _run(term, student, targets)
    _, ce, ce_gradient = _run(replace(term, divergence="soft_cross_entropy"), student, targets)
    assert torch.equal(kl_gradient, ce_gradient)
    assert output.kd[0].entropy_T is not None
    torch.testing.assert_close(ce, kl + output.kd[0].entropy_T * term.scale)


@pytest.mark.parametrize(
    ("family", "parameter", "end", "limit", "factor"),
    [
        ("generalised_jsd", "jsd_beta", 0.0, "forward_kl", lambda x: 1 / x),
        ("generalised_jsd", "jsd_beta", 1.0, "reverse_kl", lambda x: 1 / (1 - x)),
        ("skew_forward_kl", "skew_alpha", 0.0, "forward_kl", lambda x: 1),
        ("skew_reverse_kl", "skew_alpha", 0.0, "reverse_kl", lambda x: 1),
        ("symmetric_kl", "reverse_weight", 0.0, "forward_kl", lambda x: 1),
        ("symmetric_kl", "reverse_weight", 1.0, "reverse_kl", lambda x: 1),
    ],
)
def test_families_tend_to_their_ends(family: str, parameter: str, end: float, limit: str, factor: object) -> None:
    student, targets = _logits(1), LogitTargets(_logits(2))
    _, expected, expected_gradient = _run(KDTerm(limit), student, targets)
    _, exact, exact_gradient = _run(KDTerm(family, **{parameter: end}), student, targets)  # type: ignore[arg-type]
    assert torch.equal(exact, expected) and torch.equal(exact_gradient, expected_gradient)
    errors = []
    for step in (1e-3, 1e-6):
        at = end + step if end == 0 else end - step
        _, value, gradient = _run(KDTerm(family, **{parameter: at}), student, targets)  # type: ignore[arg-type]
        scale = factor(at)  # type: ignore[operator]
        errors.append(
            max(((value * scale - expected) / expected).abs().max(), (gradient * scale - expected_gradient).abs().max())
        )
    assert errors[1] < 5e-3 and errors[1] < errors[0] / 10


def test_alpha_beta_has_the_divergences_it_generalises() -> None:
    student, targets = _logits(1), LogitTargets(_logits(2))
    for a, b, name in ((1.0, 0.0, "forward_kl"), (0.0, 1.0, "reverse_kl")):
        _, value, gradient = _run(KDTerm("alpha_beta", ab_alpha=a, ab_beta=b), student, targets)
        _, expected, expected_gradient = _run(KDTerm(name), student, targets)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        near = KDTerm("alpha_beta", ab_alpha=a or 1e-5, ab_beta=b or 1e-5)
        torch.testing.assert_close(_run(near, student, targets)[1], expected, rtol=1e-3, atol=1e-6)
    p, q = _logits(2).softmax(-1), _logits(1).softmax(-1)
    _, value, _ = _run(KDTerm("alpha_beta", ab_alpha=0.5, ab_beta=0.5), student, targets)
    torch.testing.assert_close(value, 2 * (p.sqrt() - q.sqrt()).square().sum(-1))  # Hellinger


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [c for c in DENSE if c.term.temperature_on == "both"], ids=str)
def test_equal_models_have_no_divergence_and_no_gradient(case: Case, dtype: torch.dtype, implementation: str) -> None:
    student = _logits(3, dtype)
    output, value, gradient = _run(case.term, student, LogitTargets(student.clone()), implementation)
    assert output.kd[0].agree_T.all()
    eps = 2.0**-22 if dtype != torch.float64 else 1e-14
    scale = case.term.scale * max(1.0, case.term.dkd_beta) * 2
    if case.term.formula == "alpha_beta":  # a difference of sums that are not 1
        scale *= 4 / (abs(case.term.ab_alpha) or 1) / (abs(case.term.ab_beta) or 1)
    if case.term.formula == "soft_cross_entropy":
        assert output.kd[0].entropy_T is not None
        value = value - output.kd[0].entropy_T * case.term.scale
    assert value.abs().max() <= eps * scale * 4
    assert gradient.abs().max() <= eps * scale


def test_total_variation_and_jsd_stay_in_their_bounds() -> None:
    student, targets = _logits(1) * 50, LogitTargets(_logits(2) * 50)
    assert _run(KDTerm("total_variation"), student, targets)[1].max() <= 1 + 1e-12
    assert _run(KDTerm("generalised_jsd"), student, targets)[1].max() <= math.log(2) + 1e-12
    assert _run(KDTerm("skew_forward_kl"), student, targets)[1].max() <= -math.log(0.1) + 1e-12


@pytest.mark.parametrize("shift", ["student", "teacher"])
@pytest.mark.parametrize("case", [c for c in DENSE if c.term.temperature == 1], ids=str)
def test_a_shift_of_all_logits_changes_nothing(case: Case, shift: str) -> None:
    """But for the plain error of logits, which is about them and not about distributions."""
    student, teacher = _logits(1), _logits(2)
    _, expected, expected_gradient = _run(case.term, student, LogitTargets(teacher))
    student, teacher = (student + 3, teacher) if shift == "student" else (student, teacher + 3)
    _, value, gradient = _run(case.term, student, LogitTargets(teacher))
    if case.term.formula == "logit_mse":
        assert (value - expected).abs().min() > 0.1
        return
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def _all_ids(teacher: Tensor) -> SparseTargets:
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
    log_p = teacher.log_softmax(-1)[:, order]
    return SparseTargets(order.expand(teacher.shape[0], -1), log_p)


@pytest.mark.parametrize("case", [c for c in SPARSE if c.kind == "top_p_k" and c.term.temperature == 1], ids=str)
def test_sparse_with_every_id_is_dense(case: Case) -> None:
    student, teacher = _logits(1), _logits(2)
    _, expected, expected_gradient = _run(replace(case.term, tail="none"), student, LogitTargets(teacher))
    _, value, gradient = _run(case.term, student, _all_ids(teacher))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-9)


def test_the_ghost_gradient_of_listed_ids_is_the_difference() -> None:
    student, teacher = _logits(1), _logits(2)
    targets = sparse_targets("top_p_k", teacher)
    _, _, gradient = _run(KDTerm(tail="ghost"), student, targets)
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(ROWS):
        ids = targets.ids_TK[row][targets.log_probs_TK[row] > -math.inf]
        torch.testing.assert_close(gradient[row, ids], (q - p)[row, ids], rtol=1e-6, atol=1e-9)
        rest = torch.ones(VOCAB, dtype=torch.bool)
        rest[ids] = False
        torch.testing.assert_close(gradient[row].sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
        ratio = gradient[row, rest] / q[row, rest]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # the rest moves as one


def test_without_a_tail_the_gradient_keeps_the_kept_mass() -> None:
    student, teacher = _logits(1), _logits(2)
    targets = sparse_targets("top_p_k", teacher)
    _, _, gradient = _run(KDTerm(), student, targets)
    kept = targets.log_probs_TK.double().exp().sum(1, keepdim=True)
    row_of_p = torch.zeros(ROWS, VOCAB, dtype=torch.float64)
    for row in range(ROWS):
        there = targets.log_probs_TK[row] > -math.inf
        row_of_p[row, targets.ids_TK[row][there]] = targets.log_probs_TK[row][there].double().exp()
    torch.testing.assert_close(gradient, kept * student.softmax(-1) - row_of_p)


def test_the_mix_with_the_label_is_cross_entropy_with_both() -> None:
    """Apple's target: 0.9 on the teacher's top-1, 0.1 on the label; all of it where the two are the same id."""
    student, teacher = _logits(1), _logits(2)
    top_T = teacher.argmax(1)
    top_T[0] = 0  # row 0's label
    targets = SparseTargets.from_top_1(top_T, 0.9)
    _, value, _ = _run(KDTerm("soft_cross_entropy", tail="label"), student, targets)
    log_q, rows = student.log_softmax(-1), torch.arange(ROWS)
    expected = -(0.9 * log_q[rows, top_T] + 0.1 * log_q[rows, rows])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_sampled_counts_give_the_dense_gradient_on_average() -> None:
    """Sparse Logit Sampling: 50 draws a token; the average over many draws is the dense gradient within its error."""
    generator = torch.Generator().manual_seed(7)
    rows, draws, repeats = 64, 50, 40
    student, teacher = _logits(1, rows=rows), _logits(2, rows=rows)
    _, _, dense = _run(KDTerm(), student, LogitTargets(teacher))
    sums = torch.zeros_like(dense)
    for _ in range(repeats):
        drawn = torch.multinomial(teacher.softmax(-1), draws, replacement=True, generator=generator)
        counts = torch.zeros(rows, VOCAB, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))
        ids = counts.argsort(1, descending=True)[:, :draws]
        _, _, gradient = _run(KDTerm(), student, SparseTargets.from_counts(ids, counts.gather(1, ids)))
        sums += gradient
    mean = sums / repeats
    cosine = torch.nn.functional.cosine_similarity(mean.sum(0), dense.sum(0), dim=0)
    assert cosine > 0.99
    p = teacher.softmax(-1)
    error = (p * (1 - p) / (draws * repeats)).sqrt()  # of one entry
    assert ((mean - dense).abs() < 6 * error + 4 / (draws * repeats)).all()  # rare ids: a few draws
    assert 0.5 < ((mean - dense).square().sum() / error.square().sum()).sqrt() < 2


def test_truncation_biases_where_samples_do_not() -> None:
    """Renormalised top-k targets fail the comparison of the test above, so that test can fail."""
    student, teacher = _logits(1, rows=64), _logits(2, rows=64)
    _, _, dense = _run(KDTerm(), student, LogitTargets(teacher))
    targets = sparse_targets("top_p_k", teacher)
    _, _, gradient = _run(KDTerm(tail="renormalise"), student, targets)
    assert (gradient - dense).norm() > 0.1 * dense.norm()


def _tail_row(student: list[float], ids: list[int], p: list[float], term: KDTerm) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.tensor([student], dtype=torch.float64).requires_grad_()
    output = logits_loss(
        logits,
        torch.zeros(1, dtype=torch.int64),
        shard=VocabShard(0, len(student), len(student), None),
        lm_weight_T=torch.zeros(1),
        kd=[KD(term, SparseTargets(torch.tensor([ids]), torch.tensor([p]).log()), torch.ones(1))],
    )
    output.loss.backward()
    assert logits.grad is not None
    return output.kd[0].value_T, logits.grad[0], output.kd[0].agree_T


def test_the_ghost_keeps_its_gradient_where_the_student_gives_it_nothing() -> None:
    """All but the listed id underflow: together they are due half of the mass, in equal shares."""
    _, gradient, _ = _tail_row([800.0, 0.0, 0.0, 0.0], [0], [0.5], KDTerm(tail="ghost"))
    torch.testing.assert_close(gradient, torch.tensor([0.5, -1 / 6, -1 / 6, -1 / 6], dtype=torch.float64))


def test_the_ghost_is_none_where_both_models_rule_the_rest_out() -> None:
    rest = -math.inf
    value, gradient, _ = _tail_row([1.0, 0.0, rest, rest], [0, 1], [0.25, 0.75], KDTerm(tail="ghost"))
    assert value.isfinite().all() and gradient.isfinite().all()
    assert gradient[2:].count_nonzero() == 0


@pytest.mark.parametrize("tail", ["none", "renormalise", "ghost"])
def test_a_row_that_lists_nothing_has_no_gradient(tail: str) -> None:
    value, gradient, _ = _tail_row([1.0, 0.5, 0.0], [0, 1], [0.0, 0.0], KDTerm(tail=tail))  # type: ignore[arg-type]
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_agreement_is_with_the_teacher_and_not_with_the_label() -> None:
    for tail in ("none", "ghost", "label"):
        _, _, agree = _tail_row([0.0, 3.0, 1.0], [1], [0.4], KDTerm(tail=tail))  # type: ignore[arg-type]
        assert agree.all()


def test_decoupled_without_the_other_ids_is_the_label_alone() -> None:
    """Value and gradient hold for a teacher that is certain of the label, without a distribution among the others."""
    student = torch.tensor([[1.0, 0.5, 0.0]])
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]])
    for implementation in ("reference", "native"):
        _, value, gradient = _run(KDTerm("decoupled", dkd_beta=0.0), student, LogitTargets(teacher), implementation)
        q = student.softmax(-1)
        torch.testing.assert_close(value, -q[:, 0].log())
        torch.testing.assert_close(gradient, q - torch.tensor([[1.0, 0.0, 0.0]]))

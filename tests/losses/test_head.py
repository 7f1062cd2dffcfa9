"""The head split over processes against its float64 twin: values and both gradients at TP 1, 2 and 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses import twin as twins
from losses.cases import CASES, DENSE, Case
from losses.head_problem import (
    FORWARD,
    Problem,
    Result,
    chunk_budget,
    relative_error,
    run_cases,
    run_head,
    twin_errors,
)
from marks import slow
from torch import Tensor
from worlds import Worlds

from megakd.losses.head import KDTerm
from megakd.losses.kernels import choose as implementations
from megakd.losses.kernels.protocol import Chunk, SparseSlope
from megakd.losses.kernels.reference import ReferenceKernels
from megakd.losses.vocab_parallel import RowStatistics

WORLD_SIZES = [1, 2, slow(4)]


@cache
def _twins(dtype: torch.dtype) -> list[twins.Twin]:
    return [Problem.make(dtype).twin(case) for case in CASES]


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance", "chunk_tokens"),
    [
        slow(torch.float64, "reference", 1e-10, 2),
        slow(torch.float64, "reference", 1e-10, 100),
        slow(torch.float32, "reference", 1e-5, 2),
        slow(torch.float32, "auto", 1e-5, 2),
        (torch.float32, "auto", 1e-5, 100),
    ],
)
def test_split_equals_whole_in_value_and_gradient(
    world: Worlds, size: int, chunk_tokens: int, dtype: torch.dtype, implementation: str, tolerance: float
) -> None:
    """Every divergence, legal target, tail and temperature."""
    problem = Problem.make(dtype)
    answers = world(size).run(run_cases, problem, CASES, chunk_tokens, implementation)
    wrong = []
    for index, case in enumerate(CASES):
        errors = twin_errors([answer[index] for answer in answers], _twins(dtype)[index])
        if not all(error <= tolerance for error in errors.values()):
            wrong.append((str(case), errors))
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_bf16_is_no_worse_than_naive_bf16(world: Worlds, size: int, implementation: str) -> None:
    """Naive: bf16 logits, fp32 log-softmax, autograd. The margin covers the order of sums and dHidden's reduction."""
    problem = Problem.make(torch.bfloat16)
    answers = world(size).run(run_cases, problem, DENSE, 3, implementation)
    wrong = []
    for index, case in enumerate(DENSE):
        twin = problem.twin(case)
        loss, gradients = _naive(problem, case)
        errors = twin_errors([answer[index] for answer in answers], twin)
        naive = [relative_error(g, 3 * e) for g, e in zip(gradients, twin.gradients)]
        bf16 = 2.0**-8
        allowed = {
            "loss": 2 * relative_error(loss, twin.loss) + 1e-6,
            "d_hidden": 2 * naive[0] + bf16,
            "d_weight": 2 * naive[1] + bf16,
        }
        wrong += [(str(case), name, errors[name], most) for name, most in allowed.items() if not errors[name] <= most]
    assert not wrong


def _naive(problem: Problem, case: Case) -> tuple[Tensor, list[Tensor]]:
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    student = (hidden_TH @ weight_VH[:251].t()).float()
    teacher = (problem.teacher_hidden_TH @ problem.teacher_weight_VH[:251].t()).float()
    if case.term.divergence == "taid":
        teacher = (1 - case.term.taid_t) * student.detach() + case.term.taid_t * teacher
    lm = torch.nn.functional.cross_entropy(student, problem.labels_T, reduction="none")
    tempered = student / case.term.student_temperature, teacher / case.term.temperature
    kd = twins.dense(*tempered, problem.labels_T, case.term) * case.term.scale
    loss = (problem.lm_weight_T * lm).sum() + (problem.kd_weight_T * kd).sum()
    return loss.detach(), list(torch.autograd.grad(3 * loss, (hidden_TH, weight_VH)))


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_any_set_of_terms(world: Worlds, size: int, implementation: str) -> None:
    """LM, z-loss, and divergences of every family and kind of targets at once."""
    cases = [
        Case(KDTerm("reverse_kl", temperature=2.0), "dense"),
        Case(KDTerm("generalised_jsd"), "dense"),
        Case(KDTerm("adaptive_kl"), "dense"),
        Case(KDTerm("forward_kl", tail="ghost"), "top_p_k"),
        Case(KDTerm("soft_cross_entropy"), "samples"),
    ]
    problem = Problem.make()
    problem = replace(problem, z_weight_T=0.1 * problem.lm_weight_T.flip(0))
    answers = world(size).run(_run_together, problem, cases, implementation)
    errors = twin_errors(answers, problem.twin(*cases))
    assert all(error <= 1e-5 for error in errors.values()), errors
    answers = world(size).run(_run_together, problem, [], implementation)
    errors = twin_errors(answers, problem.twin())
    assert all(error <= 1e-5 for error in errors.values()), errors


def _run_together(problem: Problem, cases: list[Case], implementation: str) -> Result:
    return run_head(problem, *cases, implementation=implementation, chunk_bytes=chunk_budget(problem, 1, 4))


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_a_rank_may_hold_nothing_but_padding(world: Worlds, size: int) -> None:
    problem = Problem.make(padded_size=512)  # at TP 4 the last two ranks
    errors = twin_errors(world(size).run(run_head, problem, FORWARD), problem.twin(FORWARD))
    assert all(error <= 1e-5 for error in errors.values()), errors


def _scaled_by_world_size(problem: Problem) -> Result:
    result = run_head(problem, FORWARD)
    size = dist.get_world_size()
    return replace(result, d_hidden_TH=result.d_hidden_TH * size, d_weight_vH=result.d_weight_vH * size)


class _UnmergedGradient(ReferenceKernels):
    """The mistake of an all-reduce that autograd does not see: each slice's softmax gradient by its own sums alone."""

    def gradient(self, chunk: Chunk, rows: RowStatistics, slope: SparseSlope | None = None) -> Tensor:
        own = self.statistics(chunk)
        shift = (own["student_max"] - rows["student_max"]).exp() * own["student_sum"] / rows["student_sum"]
        names = dict(zip(rows.columns, rows.values_kR.clone()))
        names["student_sum"] = rows["student_sum"] * shift
        return super().gradient(chunk, RowStatistics(rows.columns, torch.stack([names[c] for c in rows.columns])))


def _unmerged(problem: Problem) -> Result:
    reference = implementations.IMPLEMENTATIONS["reference"]
    try:
        implementations.IMPLEMENTATIONS["reference"] = _UnmergedGradient
        implementations.made.cache_clear()
        return run_head(problem, FORWARD, implementation="reference")
    finally:
        implementations.IMPLEMENTATIONS["reference"] = reference
        implementations.made.cache_clear()


@pytest.mark.parametrize("mistake", [_scaled_by_world_size, _unmerged])
def test_planted_mistakes_are_caught(world: Worlds, mistake: Callable[[Problem], Result]) -> None:
    """Mistakes that peers make: right values everywhere, wrong gradients as soon as there is a second rank."""
    problem = Problem.make()
    twin = problem.twin(FORWARD)
    alone, split = (twin_errors(world(size).run(mistake, problem), twin) for size in (1, 2))
    assert all(error <= 1e-5 for error in alone.values())
    assert all(split[name] <= 1e-5 for name in ("loss", "lm", "kd0", "entropy0"))
    assert split["d_hidden"] > 0.1 and split["d_weight"] > 0.1


_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
)


def _count_collectives(problem: Problem, cases: list[Case], grad: bool, hidden_grad: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    originals = {name: value for name, value in vars(dist).items() if callable(value) and name in _COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, counted(name))
        budget = chunk_budget(problem, dist.get_world_size(), 2)
        run_head(problem, *cases, grad=grad, hidden_grad=hidden_grad, chunk_bytes=budget)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


ONE_GATHER = [
    Case(KDTerm(name), "dense")
    for name in (
        "forward_kl",
        "soft_cross_entropy",
        "reverse_kl",
        "symmetric_kl",
        "logit_mse",
        "decoupled",
    )
]
TWO_GATHERS = [
    Case(KDTerm(name), "dense")
    for name in (
        "generalised_jsd",
        "skew_forward_kl",
        "skew_reverse_kl",
        "total_variation",
        "alpha_beta",
        "centred_logit_mse",
    )
]


@pytest.mark.parametrize(("case", "gathers"), [(c, 1) for c in ONE_GATHER] + [(c, 2) for c in TWO_GATHERS], ids=str)
def test_gathers_a_chunk(world: Worlds, case: Case, gathers: int) -> None:
    problem = Problem.make()  # six tokens carry weight: three chunks of two
    counts = world(2).run(_count_collectives, problem, [case], True, "all_reduce")[0]
    assert counts == {"all_gather_into_tensor": 3 * gathers, "all_reduce": 1}


def test_one_all_gather_a_chunk_and_one_all_reduce(world: Worlds) -> None:
    problem = Problem.make()
    run = world(2).run
    assert run(_count_collectives, problem, [FORWARD], True, "partial")[0] == {"all_gather_into_tensor": 3}
    assert run(_count_collectives, problem, [FORWARD], False, "all_reduce")[0] == {"all_gather_into_tensor": 3}
    sparse = [Case(KDTerm("total_variation", tail="ghost"), "top_p_k")]
    counts = run(_count_collectives, problem, sparse, False, "all_reduce")[0]
    assert counts == {"all_gather_into_tensor": 2}  # no teacher's logits: twice the tokens a chunk, rounded up
    # terms share the gathers; adaptive_kl finds its head by four all-reduces a chunk
    several = [FORWARD, *TWO_GATHERS[:2]]
    counts = run(_count_collectives, problem, several, False, "all_reduce")[0]
    assert counts == {"all_gather_into_tensor": 2 * 6}  # three teachers' logits: one token a chunk
    adaptive = [Case(KDTerm("adaptive_kl"), "dense")]
    counts = run(_count_collectives, problem, adaptive, False, "all_reduce")[0]
    assert counts == {"all_gather_into_tensor": 6, "all_reduce": 12}


def test_partial_hidden_gradients_add_up(world: Worlds) -> None:
    problem = Problem.make()
    whole = world(2).run(run_head, problem, FORWARD)[0]
    parts = [result.d_hidden_TH for result in world(2).run(_partial, problem)]
    assert relative_error(parts[0] + parts[1], whole.d_hidden_TH) < 1e-6
    assert relative_error(parts[0], whole.d_hidden_TH) > 0.1


def _partial(problem: Problem) -> Result:
    return run_head(problem, FORWARD, hidden_grad="partial")

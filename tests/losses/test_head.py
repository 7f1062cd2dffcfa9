"""The head split over processes against its float64 twin: values and both gradients at TP 1, 2 and 4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses.head_problem import TERMS, Problem, Result, chunk_budget, relative_error, run_head, twin_errors
from losses.twin import DIVERGENCES
from torch import Tensor
from worlds import Worlds

from megakd.losses import head
from megakd.losses.head import Implementation, KDTerm
from megakd.losses.reference import ReferenceKernels
from megakd.losses.vocab_parallel import RowStatistics

WORLD_SIZES = [1, 2, 4]


def _run_terms(problem: Problem, chunk_tokens: int, implementation: Implementation) -> list[Result]:
    size = dist.get_world_size()
    chunk_bytes = chunk_budget(problem, size, chunk_tokens)
    return [run_head(problem, term, implementation=implementation, chunk_bytes=chunk_bytes) for term in TERMS]


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("chunk_tokens", [2, 100])
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance"),
    [(torch.float64, "reference", 1e-12), (torch.float32, "reference", 1e-5), (torch.float32, "native", 1e-5)],
)
def test_split_equals_whole_in_value_and_gradient(
    world: Worlds, size: int, chunk_tokens: int, dtype: torch.dtype, implementation: Implementation, tolerance: float
) -> None:
    problem = Problem.make(dtype)
    answers = world(size).run(_run_terms, problem, chunk_tokens, implementation)
    for index, term in enumerate(TERMS):
        errors = twin_errors([answer[index] for answer in answers], problem.twin(term))
        assert all(error <= tolerance for error in errors.values()), (term, errors)


@pytest.mark.parametrize("size", WORLD_SIZES)
@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_bf16_is_no_worse_than_naive_bf16(world: Worlds, size: int, implementation: Implementation) -> None:
    """Naive: bf16 logits, fp32 log-softmax, autograd. The margin covers the order of sums and dHidden's reduction."""
    problem = Problem.make(torch.bfloat16)
    answers = world(size).run(_run_terms, problem, 3, implementation)
    for index, term in enumerate(TERMS):
        twin = problem.twin(term)
        hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
        student = (hidden_TH @ weight_VH[:251].t()).float()
        teacher = (problem.teacher_hidden_TH @ problem.teacher_weight_VH[:251].t()).float()
        lm = torch.nn.functional.cross_entropy(student, problem.labels_T, reduction="none")
        log_p, log_q = (
            (teacher / term.temperature).log_softmax(-1),
            (student / term.student_temperature).log_softmax(-1),
        )
        kd = DIVERGENCES[term.divergence](log_p, log_q) * term.scale
        loss = (problem.lm_weight_T * lm).sum() + (problem.kd_weight_T * kd).sum()
        (3 * loss).backward()
        assert hidden_TH.grad is not None and weight_VH.grad is not None
        errors = twin_errors([answer[index] for answer in answers], twin)
        bf16 = 2.0**-8
        assert errors["loss"] <= 1.5 * relative_error(loss.detach(), twin.loss) + 1e-6
        assert errors["d_hidden"] <= 1.5 * relative_error(hidden_TH.grad, 3 * twin.gradients[0]) + bf16
        assert errors["d_weight"] <= 1.5 * relative_error(weight_VH.grad, 3 * twin.gradients[1]) + bf16


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_a_rank_may_hold_nothing_but_padding(world: Worlds, size: int) -> None:
    problem = Problem.make(padded_size=512)  # at TP 4 the last two ranks
    errors = twin_errors(world(size).run(run_head, problem, KDTerm()), problem.twin(KDTerm()))
    assert all(error <= 1e-5 for error in errors.values()), errors


def _scaled_by_world_size(problem: Problem) -> Result:
    result = run_head(problem, KDTerm())
    size = dist.get_world_size()
    return replace(result, d_hidden_TH=result.d_hidden_TH * size, d_weight_vH=result.d_weight_vH * size)


class _UnmergedGradient(ReferenceKernels):
    """The mistake of an all-reduce that autograd does not see: each slice's softmax gradient by its own sums alone."""

    def gradient(self, chunk: Any, rows: RowStatistics) -> Tensor:
        own = self.statistics(chunk)
        shift = (own["student_max"] - rows["student_max"]).exp() * own["student_sum"] / rows["student_sum"]
        names = dict(zip(rows.columns, rows.values_kR.clone()))
        names["student_kd_sum"] = rows["student_kd_sum"] * shift
        return super().gradient(chunk, RowStatistics(rows.columns, torch.stack([names[c] for c in rows.columns])))


def _unmerged(problem: Problem) -> Result:
    kernels = dict(head.IMPLEMENTATIONS)
    try:
        head.IMPLEMENTATIONS["reference"] = _UnmergedGradient()
        return run_head(problem, KDTerm(), implementation="reference")
    finally:
        head.IMPLEMENTATIONS.update(kernels)


@pytest.mark.parametrize("mistake", [_scaled_by_world_size, _unmerged])
def test_planted_mistakes_are_caught(world: Worlds, mistake: Callable[[Problem], Result]) -> None:
    """What peers get wrong: right values everywhere, wrong gradients as soon as there is a second rank."""
    problem = Problem.make()
    twin = problem.twin(KDTerm())
    alone, split = (twin_errors(world(size).run(mistake, problem), twin) for size in (1, 2))
    assert all(error <= 1e-5 for error in alone.values())
    assert all(split[name] <= 1e-5 for name in ("loss", "lm", "kd", "entropy"))
    assert split["d_hidden"] > 0.1 and split["d_weight"] > 0.1


def _count_collectives(problem: Problem, kd: KDTerm | None, grad: bool, hidden_grad: str) -> dict[str, int]:
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
        run_head(problem, kd, grad=grad, hidden_grad=hidden_grad, chunk_bytes=budget)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


_COLLECTIVES = (
    "all_gather_into_tensor",
    "all_gather",
    "all_reduce",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
)


def test_one_all_gather_a_chunk_and_one_all_reduce(world: Worlds) -> None:
    problem = Problem.make()  # six tokens carry weight: three chunks of two
    run = world(2).run
    assert run(_count_collectives, problem, KDTerm(), True, "all_reduce")[0] == {
        "all_gather_into_tensor": 3,
        "all_reduce": 1,
    }
    assert run(_count_collectives, problem, KDTerm(), True, "partial")[0] == {"all_gather_into_tensor": 3}
    assert run(_count_collectives, problem, KDTerm(), False, "all_reduce")[0] == {"all_gather_into_tensor": 3}


def test_partial_hidden_gradients_add_up(world: Worlds) -> None:
    problem = Problem.make()
    whole = world(2).run(run_head, problem, KDTerm())[0]
    parts = [result.d_hidden_TH for result in world(2).run(_partial, problem)]
    assert relative_error(parts[0] + parts[1], whole.d_hidden_TH) < 1e-6
    assert relative_error(parts[0], whole.d_hidden_TH) > 0.1


def _partial(problem: Problem) -> Result:
    return run_head(problem, KDTerm(), hidden_grad="partial")

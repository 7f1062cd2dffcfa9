"""The head against its float64 twin: values and both gradients, at TP 1, 2 and 4 on real processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from losses.twin import DIVERGENCES, Twin, head_twin
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses import head, sweep
from megakd.losses.head import HeadOutput, Implementation, KDTerm, VocabShard, head_loss
from megakd.losses.reference import ReferenceKernels
from megakd.losses.vocab_parallel import RowStatistics
from megakd.targets import DenseTargets

WORLD_SIZES = [1, 2, 4]
PADDED_ROWS = {1: 256, 2: 128, 4: 64}  # rows a rank for a vocabulary of 251


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


def _head(problem: Problem, kd: KDTerm | None, *, grad: bool = True, **options: Any) -> Result:
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


def _chunk_bytes(problem: Problem, size: int, tokens: int) -> int:
    """A budget for this many tokens a chunk."""
    return tokens * 2 * problem.hidden_TH.element_size() * (problem.weight_VH.shape[0] // size)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def _errors(results: list[Result], twin: Twin) -> dict[str, float]:
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
        "loss": _error(first.output.loss, twin.loss),
        "lm": _error(first.output.lm_T, twin.lm_T),
        "kd": _error(first.output.kd_T, twin.kd_T),
        "entropy": _error(first.output.entropy_T, twin.entropy_T),
        "d_hidden": _error(first.d_hidden_TH, 3 * twin.gradients[0]),
        "d_weight": _error(torch.cat([r.d_weight_vH for r in results]), 3 * twin.gradients[1]),
    }


TERMS = [
    KDTerm(),
    KDTerm(temperature=2.0),
    KDTerm(temperature=2.0, scale_by_temperature_squared=False),
    KDTerm("soft_cross_entropy", temperature=0.5, temperature_on="teacher"),
    KDTerm("reverse_kl", temperature=2.0),
]


def _run_terms(problem: Problem, chunk_tokens: int, implementation: Implementation) -> list[Result]:
    size = dist.get_world_size()
    chunk_bytes = _chunk_bytes(problem, size, chunk_tokens)
    return [_head(problem, term, implementation=implementation, chunk_bytes=chunk_bytes) for term in TERMS]


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
        errors = _errors([answer[index] for answer in answers], problem.twin(term))
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
        errors = _errors([answer[index] for answer in answers], twin)
        bf16 = 2.0**-8
        assert errors["loss"] <= 1.5 * _error(loss.detach(), twin.loss) + 1e-6
        assert errors["d_hidden"] <= 1.5 * _error(hidden_TH.grad, 3 * twin.gradients[0]) + bf16
        assert errors["d_weight"] <= 1.5 * _error(weight_VH.grad, 3 * twin.gradients[1]) + bf16


@pytest.mark.parametrize("size", WORLD_SIZES)
def test_a_rank_may_hold_nothing_but_padding(world: Worlds, size: int) -> None:
    problem = Problem.make(padded_size=512)  # at TP 4 the last two ranks
    errors = _errors(world(size).run(_head, problem, KDTerm()), problem.twin(KDTerm()))
    assert all(error <= 1e-5 for error in errors.values()), errors


def _scaled_by_world_size(problem: Problem) -> Result:
    result = _head(problem, KDTerm())
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
        return _head(problem, KDTerm(), implementation="reference")
    finally:
        head.IMPLEMENTATIONS.update(kernels)


@pytest.mark.parametrize("mistake", [_scaled_by_world_size, _unmerged])
def test_planted_mistakes_are_caught(world: Worlds, mistake: Callable[[Problem], Result]) -> None:
    """What peers get wrong: right values everywhere, wrong gradients as soon as there is a second rank."""
    problem = Problem.make()
    twin = problem.twin(KDTerm())
    alone, split = (_errors(world(size).run(mistake, problem), twin) for size in (1, 2))
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
        budget = _chunk_bytes(problem, dist.get_world_size(), 2)
        _head(problem, kd, grad=grad, hidden_grad=hidden_grad, chunk_bytes=budget)
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
    whole = world(2).run(_head, problem, KDTerm())[0]
    parts = [result.d_hidden_TH for result in world(2).run(_partial, problem)]
    assert _error(parts[0] + parts[1], whole.d_hidden_TH) < 1e-6
    assert _error(parts[0], whole.d_hidden_TH) > 0.1


def _partial(problem: Problem) -> Result:
    return _head(problem, KDTerm(), hidden_grad="partial")


@pytest.mark.parametrize("size", [1, 2])
def test_no_token_with_weight(world: Worlds, size: int) -> None:
    problem = Problem.make()
    none = torch.zeros_like(problem.lm_weight_T)
    for result in world(size).run(_head, replace(problem, lm_weight_T=none, kd_weight_T=none), KDTerm()):
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
    clean, dirty = (_head(p, KDTerm(), implementation=implementation) for p in (problem, poisoned))
    assert torch.equal(clean.output.loss, dirty.output.loss)
    assert torch.equal(clean.output.lm_T, dirty.output.lm_T)
    assert torch.equal(clean.d_hidden_TH, dirty.d_hidden_TH)
    assert torch.equal(clean.d_weight_vH, dirty.d_weight_vH)
    assert clean.d_hidden_TH[4].count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "native"])
def test_elsewhere_it_shows(implementation: Implementation) -> None:
    problem = Problem.make()
    problem.hidden_TH[3, 0] = math.nan
    output = _head(problem, KDTerm(), implementation=implementation).output
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
    result = _head(problem, None)
    assert result.output.kd_T is result.output.agree_T is result.output.entropy_T is None
    hidden_TH, weight_VH = problem.hidden_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
    lm_T = torch.nn.functional.cross_entropy(hidden_TH @ weight_VH[:251].t(), problem.labels_T, reduction="none")
    loss = (lm_T * problem.lm_weight_T).sum()
    (3 * loss).backward()
    assert hidden_TH.grad is not None and weight_VH.grad is not None
    assert _error(result.output.loss, loss.detach()) < 1e-5
    assert _error(result.d_hidden_TH, hidden_TH.grad) < 1e-5
    assert _error(result.d_weight_vH, weight_VH.grad) < 1e-5


def test_evaluation_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.make()
    expected = _head(problem, KDTerm()).output

    def fail(*args: Any) -> Any:
        raise AssertionError("a gradient was made")

    for kernels in head.IMPLEMENTATIONS.values():
        monkeypatch.setattr(type(kernels), "gradient", fail)
        monkeypatch.setattr(type(kernels), "statistics_and_gradient", fail)
    monkeypatch.setattr(sweep, "_add_product_inplace", fail)
    frozen = _head(problem, KDTerm(), grad=False).output
    with torch.no_grad():
        problem.hidden_TH.requires_grad_()
        assert torch.equal(_head(problem, KDTerm(), grad=False).output.loss, expected.loss)
    assert frozen.kd_T is not None and expected.kd_T is not None
    assert torch.equal(frozen.loss, expected.loss) and torch.equal(frozen.kd_T, expected.kd_T)
    assert not frozen.loss.requires_grad


def test_only_the_gradients_that_are_asked_for() -> None:
    problem = Problem.make()
    whole = _head(problem, KDTerm())
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
    single = _head(problem, KDTerm())
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
    assert _error(weight_vH.grad, single.d_weight_vH) < 1e-6


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
        _head(replace(Problem.make(), **change), KDTerm(), implementation="native")


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

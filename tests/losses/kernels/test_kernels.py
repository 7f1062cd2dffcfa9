"""Every implementation of the chunk kernels against the float64 twin, on logits: values, gradients, whole and split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from losses.cases import DENSE, UNSCALED, Case, sparse_targets
from losses.twin import Twin, logits_twin
from marks import fast_one_in
from torch import Tensor

from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels.choose import IMPLEMENTATIONS, kernels_for
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, Kernels, SparseTeacher
from megakd.losses.sparse import Buckets, sparse_values
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics, VocabShard, merge_statistics
from megakd.targets import SparseTargets

NAMES = ["reference", "native"]
PRECISION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Relative to the largest entry: rounding of the arithmetic, or, in bf16, of the gradient that is written."""
EVERY = [pair for pair in itertools.product(NAMES, PRECISION) if pair != ("native", torch.float64)]
FORWARD = Case(KDTerm(), "dense")


def _logits(rows: int, vocab_size: int, *, seed: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * scale).to(dtype)


def _run(
    name: str,
    student_RV: Tensor,
    teacher: Tensor | SparseTargets | None,
    labels_R: Tensor,
    lm_weight_R: Tensor,
    kd_weight_R: Tensor,
    term: KDTerm,
    *,
    slices: int = 1,
    padding: float = math.nan,
) -> tuple[RowStatistics, Tensor, Tensor | None]:
    """Statistics of whole rows, gradient and divergence, from a vocabulary cut into slices whose last ones hold
    padding."""
    vocab_size = student_RV.shape[1]
    width = -(-vocab_size // slices) + 2
    buckets = Buckets.of(teacher, labels_R, term, vocab_size) if isinstance(teacher, SparseTargets) else None

    def cut(logits_RV: Tensor, start: int) -> Tensor:
        piece = logits_RV[:, start : start + width]
        return torch.nn.functional.pad(piece, (0, width - piece.shape[1]), value=padding).contiguous()

    chunks = []
    for start in range(0, width * slices, width):
        side: DenseTeacher | SparseTeacher | None = None
        if isinstance(teacher, Tensor):
            side = DenseTeacher(cut(teacher, start), kd_weight_R.float(), term)
        elif buckets is not None:
            side = SparseTeacher(torch.where(buckets.ids_RK < 0, -1, buckets.ids_RK - start), term)
        num_valid = min(max(vocab_size - start, 0), width)
        chunks.append(Chunk(cut(student_RV, start), num_valid, labels_R - start, lm_weight_R.float(), teacher=side))
    kernels = [kernels_for(chunk, name if _can(name, chunk) else "reference") for chunk in chunks]  # type: ignore[arg-type]
    rows, slope, value_R = None, None, None
    if slices == 1 and not isinstance(teacher, SparseTargets) and term.formula != "adaptive_kl":
        rows, gradient_RV = kernels[0].statistics_and_gradient(chunks[0])
    else:
        merged = _merged(chunks, kernels, term)
        if buckets is not None:
            found = sparse_values(merged, buckets, term, kd_weight_R.float())
            slope, value_R, rows = found.slope, found.value_R * term.scale, merged
        else:
            rows = _with_second(merged, chunks, kernels, term)
        gradient_RV = torch.cat([k.gradient(c, rows, slope) for k, c in zip(kernels, chunks)], 1)
    assert gradient_RV[:, vocab_size:].count_nonzero() == 0
    if isinstance(teacher, Tensor):
        value_R = DIVERGENCES[term.formula].value(rows, term) * term.scale
    return rows, gradient_RV[:, :vocab_size], value_R


def _can(name: str, chunk: Chunk) -> bool:
    return IMPLEMENTATIONS[name]().supports(chunk)


def _merged(chunks: list[Chunk], kernels: list[Kernels], term: KDTerm) -> RowStatistics:
    before = [chunk.student_Rv.clone() for chunk in chunks]
    parts = [k.statistics(chunk).values_kR for k, chunk in zip(kernels, chunks)]
    for chunk, logits in zip(chunks, before):  # statistics only look
        assert torch.equal(chunk.student_Rv.nan_to_num(), logits.nan_to_num())
    return merge_statistics(
        chunks[0].columns,
        torch.stack(parts),
        student_temperature=term.student_temperature,
        teacher_temperature=term.temperature,
    )


def _with_second(merged: RowStatistics, chunks: list[Chunk], kernels: list[Kernels], term: KDTerm) -> RowStatistics:
    if chunks[0].teacher is None or not DIVERGENCES[term.formula].second_pass:
        return merged
    if term.formula == "adaptive_kl":  # its head needs a group: here two numbers that stand for it
        gaps = torch.tensor([0.3, 0.9], dtype=merged.values_kR.dtype).unsqueeze(1)
        return merged.extended(RowStatistics(("head_gap", "tail_gap"), gaps.expand(2, merged.values_kR.shape[1])))
    parts = [k.second_pass(chunk, merged) for k, chunk in zip(kernels, chunks)]
    return merged.extended(RowStatistics(parts[0].columns, torch.stack([p.values_kR for p in parts]).sum(0)))


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry, or to a tenth of a nat where all are smaller: that much fp32 leaves of a
    difference of logarithms."""
    error, size = (actual.double() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(size, 0.1), f"off by {error} of {size}"


def _lm(rows: RowStatistics) -> Tensor:
    return rows["lm_max"] - rows["label"] + rows["lm_sum"].log()


def _compare(
    name: str, dtype: torch.dtype, student: Tensor, teacher: Tensor | SparseTargets, term: KDTerm, slices: int
) -> Twin:
    rows, vocab_size = student.shape
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    lm_weight, kd_weight = (torch.rand(rows, generator=generator) + 0.1 for _ in range(2))
    twin = logits_twin(student, labels, lm_weight, [(term, teacher, kd_weight)])
    merged, gradient, value = _run(name, student, teacher, labels, lm_weight, kd_weight, term, slices=slices)
    wide = min(PRECISION[dtype], 1e-5)
    assert value is not None
    _assert_close(_lm(merged), twin.lm_T, wide)
    _assert_close(value, twin.kd_T[0], wide)
    _assert_close(gradient, twin.gradients[0], PRECISION[dtype])
    return twin


def _kernel_cases(cases: list[Case]) -> list[Case]:
    """Without those that the sweep makes of others or that need a group (taid, adaptive_kl: tested in test_head.py)."""
    return [c for c in cases if c in UNSCALED and c.term.divergence not in ("taid", "adaptive_kl")]


SPARSE = [case for case in UNSCALED if case.kind != "dense"]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("case", fast_one_in(9, _kernel_cases(DENSE)), ids=str)
def test_dense_targets(name: str, dtype: torch.dtype, case: Case) -> None:
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (1, 2))
    for slices in (1, 2, 5):
        _compare(name, dtype, student, teacher, case.term, slices)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("case", fast_one_in(9, SPARSE), ids=str)
def test_sparse_targets(name: str, dtype: torch.dtype, case: Case) -> None:
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (1, 2))
    for slices in (1, 2, 5):
        _compare(name, dtype, student, sparse_targets(case.kind, teacher), case.term, slices)


FAMILIES = [
    Case(KDTerm(name, temperature=2.0), "dense")
    for name in ("forward_kl", "symmetric_kl", "generalised_jsd", "total_variation", "logit_mse", "decoupled")
]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("vocab_size", [2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2113])
def test_every_width(name: str, dtype: torch.dtype, vocab_size: int) -> None:
    student, teacher = (_logits(3, vocab_size, seed=seed, dtype=dtype) for seed in (3, 4))
    for case in FAMILIES:
        _compare(name, dtype, student, teacher, case.term, slices=1)
    _compare(name, dtype, student, sparse_targets("top_p_k", teacher), KDTerm(tail="renormalise"), slices=1)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_one_id_leaves_nothing_to_learn(name: str, dtype: torch.dtype) -> None:
    student, teacher = (_logits(3, 1, seed=seed, dtype=dtype) for seed in (3, 4))
    zeros, ones = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    merged, gradient, value = _run(name, student, teacher, zeros, ones, ones, KDTerm())
    assert value is not None
    assert all(values.count_nonzero() == 0 for values in (_lm(merged), value, gradient))


def _finite(cases: list[Case]) -> list[Case]:
    """Without negative exponents, whose divergences are infinite between distributions this far apart."""
    return [c for c in cases if c.term.temperature == 1 and min(c.term.ab_alpha, c.term.ab_beta) >= 0]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("case", fast_one_in(5, _finite(_kernel_cases(DENSE))), ids=str)
def test_huge_logits(name: str, dtype: torch.dtype, slices: int, case: Case) -> None:
    """Logits of 1e4 either way; those near the maximum differ by little, where bf16 has steps of 64."""
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype, scale=1e4) for seed in (5, 6))
    student[:, ::3], teacher[:, ::3] = 4e4, 4e4
    if dtype != torch.bfloat16:
        student[:, ::3] += _logits(7, 84, seed=7, dtype=dtype).round()
        teacher[:, ::3] += _logits(7, 84, seed=8, dtype=dtype).round()
    _compare(name, dtype, student, teacher, case.term, slices)
    _compare(name, dtype, student - 8e4, teacher - 8e4, case.term, slices)


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("case", fast_one_in(9, _finite(SPARSE)), ids=str)
def test_huge_logits_on_sparse_targets(name: str, dtype: torch.dtype, slices: int, case: Case) -> None:
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype, scale=1e4) for seed in (5, 6))
    student[:, ::3] = 4e4
    if dtype != torch.bfloat16:
        student[:, ::3] += _logits(7, 84, seed=7, dtype=dtype).round()
    _compare(name, dtype, student, sparse_targets(case.kind, teacher / 1e4), case.term, slices)


INFINITE_WHERE_THE_TEACHER_RULES_OUT = ("reverse_kl", "symmetric_kl", "logit_mse", "centred_logit_mse")


def _survives(case: Case) -> bool:
    """Return whether the divergence is finite if the teacher alone rules out an id."""
    term = case.term
    if term.formula == "alpha_beta":
        return term.ab_alpha > 0 and term.ab_alpha + term.ab_beta > 0
    return term.formula not in INFINITE_WHERE_THE_TEACHER_RULES_OUT


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("case", fast_one_in(5, [c for c in _kernel_cases(DENSE) if c.term.temperature == 1]), ids=str)
def test_minus_infinity(name: str, dtype: torch.dtype, slices: int, case: Case) -> None:
    """An id that both models rule out is not there: the values are those of the vocabulary without it. One that a model
    rules out alone costs infinitely where the divergence says so."""
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (9, 10))
    there = torch.ones(251, dtype=torch.bool)
    there[20:140] = False  # a whole slice without mass
    student[:, ~there] = teacher[:, ~there] = -math.inf
    labels, ones = torch.arange(7) + 200, torch.ones(7)
    twin = logits_twin(student[:, there], labels - 120, ones, [(case.term, teacher[:, there], ones)])
    merged, gradient, value = _run(name, student, teacher, labels, ones, ones, case.term, slices=slices)
    wide = min(PRECISION[dtype], 1e-5)
    assert value is not None
    _assert_close(_lm(merged), twin.lm_T, wide)
    _assert_close(value, twin.kd_T[0], wide)
    _assert_close(gradient[:, there], twin.gradients[0], PRECISION[dtype])
    assert gradient[:, ~there].count_nonzero() == 0

    teacher[2, 160] = -math.inf  # the teacher alone
    _, gradient, value = _run(name, student, teacher, labels, ones, ones, case.term, slices=slices)
    assert value is not None
    expected = [True] * 7
    expected[2] = _survives(case)
    assert value.isfinite().tolist() == expected
    assert gradient[2].isfinite().all() or not expected[2]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("slices", [1, 3])
def test_what_the_student_rules_out_costs_infinitely(name: str, dtype: torch.dtype, slices: int) -> None:
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (9, 10))
    student[2, 160] = -math.inf
    labels, ones = torch.arange(7) + 200, torch.ones(7)
    for targets in (teacher, sparse_targets("top_p_k", teacher)):
        if isinstance(targets, SparseTargets):
            targets.ids_TK[2, 0] = 160
        _, _, value = _run(name, student, targets, labels, ones, ones, KDTerm(), slices=slices)
        assert value is not None
        assert (value == math.inf).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_a_weight_of_zero_takes_its_term_out(name: str, dtype: torch.dtype) -> None:
    labels, ones = torch.arange(4), torch.ones(4)
    kd_weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for case in _kernel_cases([c for c in DENSE if c.term.temperature == 1]):
        student, teacher = (_logits(4, 251, seed=seed, dtype=dtype) for seed in (12, 13))
        _, expected, _ = _run(name, student, teacher, labels, ones, kd_weight, case.term)
        teacher[1], teacher[3, 7] = math.nan, math.inf
        _, gradient, _ = _run(name, student, teacher, labels, ones, kd_weight, case.term)
        assert torch.equal(gradient, expected), case
        _, alone, _ = _run(name, student, None, labels, ones, kd_weight, KDTerm())
        assert torch.equal(gradient[1::2], alone[1::2]), case


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_value(name: str, dtype: torch.dtype, where: str, what: float) -> None:
    labels, ones = torch.arange(3), torch.ones(3)
    for case in _kernel_cases([c for c in DENSE if c.term.temperature == 1]):
        student, teacher = (_logits(3, 251, seed=seed, dtype=dtype) for seed in (14, 15))
        (student if where == "student" else teacher)[1, 100] = what
        merged, _, value = _run(name, student, teacher, labels, ones, ones, case.term, slices=2)
        assert value is not None
        assert value.isfinite().tolist() == [True, False, True], case
        assert _lm(merged).isfinite().tolist() == [True, where == "teacher", True]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("divergence", ["forward_kl", "decoupled"])
def test_agreement_is_a_shared_maximum(name: str, slices: int, divergence: str) -> None:
    student, teacher = torch.zeros(4, 31), torch.zeros(4, 31)
    student[0, 3], teacher[0, 3] = 1.0, 2.0  # the same id
    student[1, 3], teacher[1, 4] = 1.0, 2.0  # neighbours
    student[2, 3], teacher[2, 30] = 1.0, 2.0  # far apart
    student[3, [3, 30]], teacher[3, 30] = 1.0, 2.0  # a tie, of which one is shared
    none, labels = torch.zeros(4), torch.tensor([3, 3, 30, 7])
    merged, _, _ = _run(name, student, teacher, labels, none, torch.ones(4), KDTerm(divergence), slices=slices)
    assert merged["agree"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_shards_know_what_is_padding() -> None:
    assert [VocabShard(start, 64, 100, None).num_valid for start in (0, 64, 128)] == [64, 36, 0]

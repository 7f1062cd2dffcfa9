"""Every implementation of the chunk kernels against the float64 twin, on logits: values, gradients, whole and split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from losses.twin import DIVERGENCES, Twin, logits_twin
from torch import Tensor

from megakd.losses import divergences
from megakd.losses.kernels import Chunk, KDTerm, Kernels, Teacher
from megakd.losses.native import NativeKernels
from megakd.losses.reference import ReferenceKernels
from megakd.losses.vocab_parallel import RowStatistics, merge_statistics

KERNELS: dict[str, Kernels] = {"reference": ReferenceKernels(), "native": NativeKernels()}
TERMS = [
    KDTerm(divergence, temperature, on, scaled)  # type: ignore[arg-type]
    for divergence in DIVERGENCES
    for temperature, on, scaled in [
        (1.0, "both", True),
        (2.5, "both", True),
        (2.5, "both", False),
        (0.5, "teacher", True),
    ]
]
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Relative to the largest entry: rounding of the arithmetic, or, in bf16, of the gradient that is written."""


def _combinations() -> list[tuple[str, torch.dtype]]:
    every = itertools.product(KERNELS, PRECISION)
    return [(name, dtype) for name, dtype in every if not (name == "native" and dtype == torch.float64)]


def _logits(rows: int, vocab_size: int, *, seed: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * scale).to(dtype)


def _run(
    kernels: Kernels,
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    labels_R: Tensor,
    lm_weight_R: Tensor,
    kd_weight_R: Tensor,
    term: KDTerm,
    *,
    slices: int = 1,
    padding: float = math.nan,
) -> tuple[RowStatistics, Tensor]:
    """Statistics of whole rows and the gradient, from a vocabulary cut into slices whose last ones hold padding."""
    vocab_size = student_RV.shape[1]
    width = -(-vocab_size // slices) + 2

    def cut(logits_RV: Tensor, start: int) -> Tensor:
        piece = logits_RV[:, start : start + width]
        return torch.nn.functional.pad(piece, (0, width - piece.shape[1]), value=padding).contiguous()

    chunks = []
    for start in range(0, width * slices, width):
        teacher = None if teacher_RV is None else Teacher(cut(teacher_RV, start), kd_weight_R, term)
        num_valid = min(max(vocab_size - start, 0), width)
        chunks.append(Chunk(cut(student_RV, start), num_valid, labels_R - start, lm_weight_R, teacher))
    if slices == 1:
        merged, gradient_Rv = kernels.statistics_and_gradient(chunks[0])
        assert gradient_Rv[:, vocab_size:].count_nonzero() == 0
        return merged, gradient_Rv[:, :vocab_size]
    parts = [kernels.statistics(chunk).values_kR for chunk in chunks]
    merged = merge_statistics(
        chunks[0].columns,
        torch.stack(parts),
        student_temperature=term.student_temperature,
        teacher_temperature=term.temperature,
    )
    gradient_RV = torch.cat([kernels.gradient(chunk, merged) for chunk in chunks], 1)
    assert gradient_RV[:, vocab_size:].count_nonzero() == 0
    return merged, gradient_RV[:, :vocab_size]


def _values(rows: RowStatistics, term: KDTerm) -> tuple[Tensor, Tensor]:
    lm_R = rows["student_max"] - rows["label"] + rows["student_sum"].log()
    return lm_R, divergences.DIVERGENCES[term.divergence].value(rows) * term.scale


def _twin(student: Tensor, teacher: Tensor, *args: Tensor, term: KDTerm) -> Twin:
    return logits_twin(
        student,
        teacher,
        *args,
        divergence=term.divergence,
        student_temperature=term.student_temperature,
        teacher_temperature=term.temperature,
        scale=term.scale,
    )


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), f"off by {error} of {expected.abs().max().item()}"


def _compare(
    name: str, dtype: torch.dtype, student: Tensor, teacher: Tensor, term: KDTerm, slices: int, seed: int = 0
) -> None:
    rows, vocab_size = student.shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    lm_weight, kd_weight = (torch.rand(rows, generator=generator) + 0.1 for _ in range(2))
    twin = _twin(student, teacher, labels, lm_weight, kd_weight, term=term)
    merged, gradient = _run(KERNELS[name], student, teacher, labels, lm_weight, kd_weight, term, slices=slices)
    lm, kd = _values(merged, term)
    wide = min(PRECISION[dtype], 1e-5)
    _assert_close(lm, twin.lm_T, wide)
    _assert_close(kd, twin.kd_T, wide)
    _assert_close(divergences.teacher_entropy(merged), twin.entropy_T, wide)
    _assert_close(gradient, twin.gradients[0], PRECISION[dtype])


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("term", TERMS, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 5])
def test_values_and_gradient_equal_the_twin(name: str, dtype: torch.dtype, term: KDTerm, slices: int) -> None:
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (1, 2))
    _compare(name, dtype, student, teacher, term, slices)


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2113])
def test_every_width(name: str, dtype: torch.dtype, vocab_size: int) -> None:
    student, teacher = (_logits(3, vocab_size, seed=seed, dtype=dtype) for seed in (3, 4))
    if vocab_size == 1:  # nothing to learn: all is exactly 0
        merged, gradient = _run(
            KERNELS[name], student, teacher, torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.ones(3), KDTerm()
        )
        assert all(value.count_nonzero() == 0 for value in (*_values(merged, KDTerm()), gradient))
        return
    _compare(name, dtype, student, teacher, KDTerm(temperature=2.0), slices=1)


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("slices", [1, 3])
def test_huge_logits(name: str, dtype: torch.dtype, slices: int) -> None:
    """Logits of 1e4 either way; those near the maximum differ by little, where bf16 has steps of 64."""
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype, scale=1e4) for seed in (5, 6))
    student[:, ::3], teacher[:, ::3] = 4e4, 4e4
    if dtype != torch.bfloat16:
        student[:, ::3] += _logits(7, 84, seed=7, dtype=dtype).round()
        teacher[:, ::3] += _logits(7, 84, seed=8, dtype=dtype).round()
    _compare(name, dtype, student, teacher, KDTerm(), slices)
    _compare(name, dtype, student - 8e4, teacher - 8e4, KDTerm(temperature=2.0), slices)


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("slices", [1, 3])
def test_minus_infinity(name: str, dtype: torch.dtype, slices: int) -> None:
    """An id that the teacher rules out adds exactly nothing; one that only the student rules out costs infinitely."""
    student, teacher = (_logits(7, 251, seed=seed, dtype=dtype) for seed in (9, 10))
    teacher[:, 5:150] = -math.inf  # a whole slice without mass
    student[:, 20:140] = -math.inf
    labels, ones = torch.arange(7) + 200, torch.ones(7)
    twin = _twin(student, teacher, labels, ones, ones, term=KDTerm())
    merged, gradient = _run(KERNELS[name], student, teacher, labels, ones, ones, KDTerm(), slices=slices)
    lm, kd = _values(merged, KDTerm())
    _assert_close(lm, twin.lm_T, min(PRECISION[dtype], 1e-5))
    _assert_close(kd, twin.kd_T, min(PRECISION[dtype], 1e-5))
    expected = torch.where(student == -math.inf, 0.0, twin.gradients[0])
    _assert_close(gradient, expected, PRECISION[dtype])

    student[2, 160] = -math.inf
    merged, _ = _run(KERNELS[name], student, teacher, labels, ones, ones, KDTerm(), slices=slices)
    assert (_values(merged, KDTerm())[1] == math.inf).tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("slices", [1, 3])
def test_equal_models_have_no_divergence_and_no_gradient(name: str, dtype: torch.dtype, slices: int) -> None:
    student = _logits(7, 251, seed=11, dtype=dtype)
    none, ones = torch.zeros(7), torch.ones(7)
    labels = torch.full((7,), -100)
    merged, gradient = _run(KERNELS[name], student, student.clone(), labels, none, ones, KDTerm(), slices=slices)
    assert _values(merged, KDTerm())[1].count_nonzero() == 0
    assert gradient.abs().max() <= 2.0**-24  # the rounding of one product, where it is fused with the subtraction
    assert merged["agree"].eq(1).all()


@pytest.mark.parametrize(("name", "dtype"), _combinations())
def test_a_weight_of_zero_takes_its_term_out(name: str, dtype: torch.dtype) -> None:
    student, teacher = (_logits(4, 251, seed=seed, dtype=dtype) for seed in (12, 13))
    labels, ones = torch.arange(4), torch.ones(4)
    kd_weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    _, expected = _run(KERNELS[name], student, teacher, labels, ones, kd_weight, KDTerm())
    teacher[1], teacher[3, 7] = math.nan, math.inf
    _, gradient = _run(KERNELS[name], student, teacher, labels, ones, kd_weight, KDTerm())
    assert torch.equal(gradient, expected)
    _, alone = _run(KERNELS[name], student, None, labels, ones, kd_weight, KDTerm())
    assert torch.equal(gradient[1::2], alone[1::2])


@pytest.mark.parametrize(("name", "dtype"), _combinations())
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_value(name: str, dtype: torch.dtype, where: str, what: float) -> None:
    student, teacher = (_logits(3, 251, seed=seed, dtype=dtype) for seed in (14, 15))
    (student if where == "student" else teacher)[1, 100] = what
    labels, ones = torch.arange(3), torch.ones(3)
    merged, _ = _run(KERNELS[name], student, teacher, labels, ones, ones, KDTerm(), slices=2)
    lm, kd = _values(merged, KDTerm())
    assert kd.isfinite().tolist() == [True, False, True]
    assert lm.isfinite().tolist() == [True, where == "teacher", True]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("slices", [1, 4])
def test_agreement_is_a_shared_maximum(name: str, slices: int) -> None:
    student, teacher = torch.zeros(4, 31), torch.zeros(4, 31)
    student[0, 3], teacher[0, 3] = 1.0, 2.0  # the same id
    student[1, 3], teacher[1, 4] = 1.0, 2.0  # neighbours
    student[2, 3], teacher[2, 30] = 1.0, 2.0  # far apart
    student[3, [3, 30]], teacher[3, 30] = 1.0, 2.0  # a tie, of which one is shared
    none, labels = torch.zeros(4), torch.full((4,), -1)
    merged, _ = _run(KERNELS[name], student, teacher, labels, none, torch.ones(4), KDTerm(), slices=slices)
    assert merged["agree"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_sums_do_not_lose_precision_with_the_vocabulary() -> None:
    student, teacher = (_logits(2, 300_007, seed=seed, dtype=torch.float32, scale=1.0) for seed in (16, 17))
    _compare("native", torch.float32, student, teacher, KDTerm(), slices=1)


def test_threads_do_not_change_bits() -> None:
    student, teacher = (_logits(37, 251, seed=seed, dtype=torch.bfloat16) for seed in (18, 19))
    labels, ones = torch.arange(37), torch.ones(37)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(_run(KERNELS["native"], student, teacher, labels, ones, ones, KDTerm()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0].values_kR, results[1][0].values_kR)
    assert torch.equal(results[0][1], results[1][1])


def test_the_native_sweep_refuses_arrays_that_do_not_fit() -> None:
    from megakd import _csrc

    student, labels, weight = torch.zeros(2, 8).numpy(), torch.zeros(2).long().numpy(), torch.zeros(2).numpy()
    statistics = torch.zeros(3, 2).numpy()
    options = (None, "forward_kl", 1.0, 1.0, 1.0)
    _csrc.head_sweep("both", student, None, 8, labels, weight, *options, statistics, 1)
    for wrong in (
        ("neither", student, None, 8, labels, weight, *options, statistics, 1),
        ("both", student, None, 9, labels, weight, *options, statistics, 1),
        ("both", student[:, ::2], None, 4, labels, weight, *options, statistics, 1),
        ("both", student, None, 8, labels[:1], weight, *options, statistics, 1),
        ("both", student, None, 8, labels, weight.astype("float64"), *options, statistics, 1),
        ("both", student, student, 8, labels, weight, *options, statistics, 1),
        ("both", student, None, 8, labels, weight, *options, statistics[:2], 1),
    ):
        with pytest.raises(ValueError, match="head_sweep"):
            _csrc.head_sweep(*wrong)  # type: ignore[arg-type]

"""The Triton kernels against the float64 twin and the reference; ``test_triton.py`` runs this file by its name.

It needs a process in which Triton was told before its import to interpret what it would compile, or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from losses.cases import UNSCALED, Case, sparse_targets
from losses.twin import logits_twin
from torch import Tensor

from megakd.losses.adaptive_kl import head_and_tail_gap
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels.gpu.launch import TritonKernels
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, Kernels, SparseTeacher
from megakd.losses.kernels.reference import ReferenceKernels
from megakd.losses.logits import logits_loss
from megakd.losses.rows import KD
from megakd.losses.sparse import Buckets, sparse_values
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics, VocabShard, merge_statistics
from megakd.targets import LogitTargets, SparseTargets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB_SIZE, BLOCK = 2, 179, 64  # several blocks, the last one not full
KERNELS = TritonKernels(block=BLOCK)
FP32 = 1e-5
WRITTEN = {torch.float32: FP32, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Rounding of the gradient that is written; a GPU rounds to the nearest bf16, Triton's interpreter cuts off."""


def _family(case: Case) -> tuple[object, ...]:
    """Cases that are the same kernel with other numbers."""
    term = case.term
    exponents = (term.ab_alpha, term.ab_beta) if term.divergence == "alpha_beta" else ()
    return (case.kind, term.tail, term.formula, *exponents)


EVERY = list({(_family(case), case.term.temperature == 1): case for case in UNSCALED}.values())
EVERY += [case for case in UNSCALED if case.term == KDTerm(temperature=2.5)]
"""An untempered and a tempered one of every family: temperatures are numbers that every kernel is given."""
SPARSE = [Case(KDTerm(tail="spread"), "top_p_k"), Case(KDTerm(temperature=2.5, tail="renormalise"), "top_p_k")]
"""Cases of sparse targets; other kinds and tails differ outside the kernels alone."""
DENSE = [
    case for case in {_family(c): c for c in EVERY if c.kind == "dense"}.values() if case.term.divergence != "taid"
]
"""The last and so a tempered one of every family."""


def _logits(seed: int, dtype: torch.dtype = torch.float32, *, rows: int = ROWS, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCAB_SIZE, generator=generator) * scale).to(dtype)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry, or to a tenth of a nat where all are smaller; the same NaN and infinities."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    finite = expected.isfinite()
    assert torch.equal(
        actual.masked_fill(finite, 0.0).nan_to_num(7.0), expected.masked_fill(finite, 0.0).nan_to_num(7.0)
    )
    if finite.any():
        error, size = (actual - expected)[finite].abs().max().item(), expected[finite].abs().max().item()
        assert error <= tolerance * max(size, 0.1), f"off by {error} of {size}"


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_loss_and_its_gradient(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakd.losses.sweep.kernels_for", lambda chunk, implementation: KERNELS)
    student, teacher = _logits(1), _logits(2)
    targets = teacher if case.kind == "dense" else sparse_targets(case.kind, teacher)
    labels = torch.tensor([178, 3])
    lm_weight, kd_weight, z_weight = (torch.tensor(x) for x in ([0.5, 0.0], [1.0, 0.7], [0.1, 0.0]))
    twin = logits_twin(student, labels, lm_weight, [(case.term, targets, kd_weight)], z_weight_T=z_weight)

    def padded(logits: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits, (0, BLOCK), value=math.nan).to(DEVICE)

    leaf = padded(student).requires_grad_()
    output = logits_loss(
        leaf,
        labels.to(DEVICE),
        shard=VocabShard(0, VOCAB_SIZE + BLOCK, VOCAB_SIZE, None),
        lm_weight_T=lm_weight.to(DEVICE),
        z_weight_T=z_weight.to(DEVICE),
        kd=[KD(case.term, _on_device(targets, padded), kd_weight.to(DEVICE))],
    )
    output.loss.backward()
    assert leaf.grad is not None
    _assert_close(output.loss.detach(), twin.loss, FP32)
    _assert_close(output.lm_T, twin.lm_T, FP32)
    _assert_close(output.kd[0].value_T, twin.kd_T[0], FP32)
    _assert_close(leaf.grad[:, :VOCAB_SIZE], twin.gradients[0], FP32)
    assert leaf.grad[:, VOCAB_SIZE:].count_nonzero() == 0
    if twin.entropy_T[0] is not None:
        assert output.kd[0].entropy_T is not None
        _assert_close(output.kd[0].entropy_T, twin.entropy_T[0], FP32)


def _on_device(targets: Tensor | SparseTargets, padded: object) -> LogitTargets | SparseTargets:
    if isinstance(targets, Tensor):
        return LogitTargets(padded(targets))  # type: ignore[operator]
    return SparseTargets(targets.ids_TK.to(DEVICE), targets.log_probs_TK.to(DEVICE), targets.kind)


def _chunks(
    case: Case, student: Tensor, teacher: Tensor, width: int, weights: Sequence[float], dtype: torch.dtype | None = None
) -> tuple[list[Chunk], Buckets | None]:
    """The rows in slices of a width, the last of which hold padding only."""
    weight, labels = torch.tensor(weights, device=DEVICE), torch.arange(len(weights), device=DEVICE) * 80
    buckets = None
    if case.kind != "dense":
        targets = sparse_targets(case.kind, teacher.float())
        buckets = Buckets.of(_on_device(targets, None), labels, case.term, VOCAB_SIZE)  # type: ignore[arg-type]

    def cut(logits: Tensor, start: int) -> Tensor:
        piece = logits[:, start : start + width]
        padded = torch.nn.functional.pad(piece, (0, width - piece.shape[1]), value=math.nan)
        return padded.to(DEVICE, dtype or logits.dtype).contiguous()

    chunks = []
    for start in range(0, VOCAB_SIZE + width, width):
        side: DenseTeacher | SparseTeacher
        if buckets is None:
            side = DenseTeacher(cut(teacher, start), weight, case.term)
        else:
            side = SparseTeacher(torch.where(buckets.ids_RK < 0, -1, buckets.ids_RK - start), case.term)
        num_valid = min(max(VOCAB_SIZE - start, 0), width)
        chunks.append(Chunk(cut(student, start), num_valid, labels - start, weight, 0.1 * weight, side))
    return chunks, buckets


def _walk(kernels: Kernels, case: Case, chunks: list[Chunk], buckets: Buckets | None) -> tuple[RowStatistics, Tensor]:
    """Merged statistics and the gradient, as a sweep over a split vocabulary makes them."""
    assert all(kernels.supports(chunk) for chunk in chunks)
    before = [chunk.student_Rv.clone() for chunk in chunks]
    parts = [kernels.statistics(chunk) for chunk in chunks]
    for chunk, logits in zip(chunks, before):  # statistics only look
        torch.testing.assert_close(chunk.student_Rv, logits, rtol=0, atol=0, equal_nan=True)
    rows = merge_statistics(
        chunks[0].columns,
        torch.stack([part.values_kR for part in parts]),
        student_temperature=case.term.student_temperature,
        teacher_temperature=case.term.temperature,
    )
    slope = None
    if buckets is not None:
        slope = sparse_values(rows, buckets, case.term, chunks[0].lm_weight_R).slope
    elif case.term.formula == "adaptive_kl":  # its head needs a group: here two numbers that stand for it
        gaps = torch.tensor([[0.3], [0.9]], dtype=rows.values_kR.dtype, device=DEVICE)
        rows = rows.extended(RowStatistics(("head_gap", "tail_gap"), gaps.expand(2, rows.values_kR.shape[1])))
    elif DIVERGENCES[case.term.formula].second_pass:
        seconds = [kernels.second_pass(chunk, rows) for chunk in chunks]
        rows = rows.extended(RowStatistics(seconds[0].columns, sum(part.values_kR for part in seconds)))  # type: ignore[arg-type]
    gradient = torch.cat([kernels.gradient(chunk, rows, slope) for chunk in chunks], 1)
    assert gradient[:, VOCAB_SIZE:].count_nonzero() == 0
    return rows, gradient[:, :VOCAB_SIZE]


def _compare(case: Case, student: Tensor, teacher: Tensor, width: int, weights: Sequence[float] = (1.0, 0.5)) -> None:
    """Split into slices, the same as the reference in float64 on whole rows."""
    rows, gradient = _walk(KERNELS, case, *_chunks(case, student, teacher, width, weights))
    whole = _chunks(case, student, teacher, VOCAB_SIZE + 1, weights, torch.float64)
    expected_rows, expected = _walk(ReferenceKernels(), case, *whole)
    assert rows.columns == expected_rows.columns
    for name in rows.columns:
        _assert_close(rows[name], expected_rows[name], FP32)
    _assert_close(gradient, expected, WRITTEN[student.dtype])


@pytest.mark.parametrize("case", DENSE + SPARSE, ids=str)
def test_a_split_vocabulary(case: Case) -> None:
    _compare(case, _logits(3), _logits(4), width=126)


@pytest.mark.parametrize("case", [case for case in DENSE + SPARSE if case.term.ab_beta >= 0], ids=str)
def test_huge_logits(case: Case) -> None:
    student, teacher = (_logits(seed, scale=1e4) for seed in (5, 6))
    student[:, ::3] = 4e4 + _logits(7)[:, ::3].round()
    teacher[:, ::3] = 4e4 + _logits(8)[:, ::3].round()
    _compare(case, student, teacher if case.kind == "dense" else teacher / 1e4, width=VOCAB_SIZE)


@pytest.mark.parametrize("case", DENSE + SPARSE, ids=str)
def test_ids_that_are_ruled_out(case: Case) -> None:
    """By both in a whole block and in a row's first one, by the teacher alone, by the student alone."""
    student, teacher = _logits(9), _logits(10)
    student[:, 20:140] = teacher[:, 20:140] = -math.inf
    student[0, :20] = teacher[0, :20] = -math.inf
    if case.kind == "dense":
        teacher[1, 160] = -math.inf
        _compare(case, student, teacher, width=VOCAB_SIZE)
        student[1, 170] = -math.inf
    _compare(case, student, teacher, width=VOCAB_SIZE)


@pytest.mark.parametrize(("a", "b"), [(-1.3, 0.5), (-0.5, -0.5), (0.0, -0.5), (-0.5, 0.0), (-0.5, 0.5), (0.5, -1.3)])
def test_negative_exponents(a: float, b: float) -> None:
    """The value in row 0, where ids are possible, and in row 1, where the limit is infinite; never NaN."""
    case = Case(KDTerm("alpha_beta", ab_alpha=a, ab_beta=b), "dense")
    student, teacher = _logits(9, scale=1.0), _logits(10, scale=1.0)
    _compare(case, student, teacher, width=126)
    student[1, 170] = teacher[1, 160] = -math.inf
    rows, _ = _walk(KERNELS, case, *_chunks(case, student, teacher, VOCAB_SIZE, (1.0, 0.5)))
    value = DIVERGENCES[case.term.formula].value(rows, case.term)
    assert value[0].isfinite() and value[1] == math.inf


def test_the_centred_error_of_an_id_that_one_model_rules_out() -> None:
    case = Case(KDTerm("centred_logit_mse"), "dense")
    student, teacher = _logits(9), _logits(10)
    student[1, 170] = -math.inf
    rows, gradient = _walk(KERNELS, case, *_chunks(case, student, teacher, 126, (1.0, 0.5)))
    value = DIVERGENCES[case.term.formula].value(rows, case.term)
    assert value[0].isfinite() and value[1] == math.inf and not gradient.isnan().any()


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_what_is_not_finite_shows_unless_it_weighs_nothing(case: Case) -> None:
    student, teacher = _logits(11, rows=3), _logits(12, rows=3)
    weights = [0.5, 0.0, 1.0]
    _, clean = _walk(KERNELS, case, *_chunks(case, student, teacher, VOCAB_SIZE, weights))
    teacher[0, 70], teacher[1, 70], student[1, 90] = math.nan, math.nan, math.inf
    rows, gradient = _walk(KERNELS, case, *_chunks(case, student, teacher, VOCAB_SIZE, weights))
    assert DIVERGENCES[case.term.formula].value(rows, case.term).isfinite().tolist() == [False, False, True]
    assert (rows["lm_max"] + rows["lm_sum"].log()).isfinite().tolist() == [True, False, True]
    assert gradient[1].count_nonzero() == 0 and torch.equal(gradient[2], clean[2])


@pytest.mark.parametrize("student_dtype", WRITTEN)
@pytest.mark.parametrize("teacher_dtype", WRITTEN)
def test_dtypes_may_differ(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    student, teacher = _logits(13, student_dtype), _logits(14, teacher_dtype)
    for case in (Case(KDTerm("symmetric_kl"), "dense"), Case(KDTerm(tail="spread"), "top_p_k")):
        _compare(case, student, teacher, width=VOCAB_SIZE)


@pytest.mark.parametrize("divergence", ["forward_kl", "decoupled"])
def test_agreement_is_a_shared_maximum(divergence: str) -> None:
    student, teacher = torch.zeros(5, VOCAB_SIZE), torch.zeros(5, VOCAB_SIZE)
    student[0, 3], teacher[0, 3] = 1.0, 2.0  # the same id
    student[1, 3], teacher[1, 4] = 1.0, 2.0  # neighbours
    student[2, 3], teacher[2, 150] = 1.0, 2.0  # far apart
    student[3, [3, 150]], teacher[3, 150] = 1.0, 2.0  # a tie, of which one is shared
    student[4, [3, 150]], teacher[4, [3, 100]] = 1.0, 2.0  # the shared one comes first
    for label in (3, 170):
        chunk = Chunk(
            student.to(DEVICE),
            VOCAB_SIZE,
            torch.full((5,), label, device=DEVICE),
            torch.ones(5, device=DEVICE),
            teacher=DenseTeacher(teacher.to(DEVICE), torch.ones(5, device=DEVICE), KDTerm(divergence)),
        )
        assert KERNELS.statistics(chunk)["agree"].tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_lm_alone_and_rows_apart() -> None:
    """No teacher, and logits that are columns of something wider, which nobody else may touch."""
    wide = torch.full((ROWS, VOCAB_SIZE + 40), 7.0, device=DEVICE)
    wide[:, :VOCAB_SIZE] = _logits(15)
    labels, weight = torch.tensor([178, -5], device=DEVICE), torch.tensor([1.0, 2.0], device=DEVICE)
    chunk = Chunk(wide[:, :VOCAB_SIZE], VOCAB_SIZE, labels, weight, 0.1 * weight)
    reference = replace(chunk, student_Rv=chunk.student_Rv.double())
    expected_rows, expected = ReferenceKernels().statistics_and_gradient(reference)
    rows, gradient = KERNELS.statistics_and_gradient(chunk)
    _assert_close(rows.values_kR, expected_rows.values_kR, FP32)
    _assert_close(gradient, expected, FP32)
    assert gradient.data_ptr() == wide.data_ptr() and (wide[:, VOCAB_SIZE:] == 7.0).all()


def test_what_is_left_to_others() -> None:
    def chunk(student: Tensor) -> Chunk:
        return Chunk(student.to(DEVICE), 8, torch.arange(4, device=DEVICE), torch.ones(4, device=DEVICE))

    assert KERNELS.supports(chunk(torch.zeros(4, 8)))
    assert not KERNELS.supports(chunk(torch.zeros(4, 8, dtype=torch.float64)))
    assert not KERNELS.supports(chunk(torch.zeros(8, 4).t()))


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_adaptive_kl(mu: float, dtype: torch.dtype) -> None:
    """Found by the kernels as by torch, with zeros of both signs, equal logits, and padding behind the slice."""
    case = Case(KDTerm("adaptive_kl", akl_mu=mu, temperature=1.5), "dense")
    student, teacher = _logits(5, dtype), _logits(6, dtype)
    teacher[:, 10:14] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    teacher[:, 20:23] = teacher.max()
    teacher[1] -= 4.0
    (chunk, *_), _ = _chunks(case, student, teacher, VOCAB_SIZE + BLOCK, (1.0, 0.5))
    rows = KERNELS.statistics(chunk)
    shard = VocabShard(0, VOCAB_SIZE + BLOCK, VOCAB_SIZE, None)
    found, expected = (head_and_tail_gap(chunk, rows, shard, kernels) for kernels in (KERNELS, None))
    assert found.columns == expected.columns == ("head_gap", "tail_gap")
    _assert_close(found.values_kR, expected.values_kR, FP32)

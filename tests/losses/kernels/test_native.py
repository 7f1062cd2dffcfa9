"""Properties of the native kernels alone: threads, arrays that may not fit, fp32 sums over large vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from losses.cases import CASES, DENSE, Case, sparse_targets
from losses.twin import logits_twin
from marks import fast_one_in
from numpy.typing import NDArray
from torch import Tensor

from megakd import _csrc
from megakd.losses.kernels.native import NativeKernels
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, SparseTeacher
from megakd.losses.logits import logits_loss
from megakd.losses.rows import KD, HeadOutput
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import VocabShard
from megakd.targets import LogitTargets

NATIVE = NativeKernels()
# Every divergence on every kind of targets once, with the last of its parameters' variants.
PLAIN = list({(c.term.divergence, c.kind, c.term.tail): c for c in CASES if c.term.temperature == 1}.values())


def _logits(rows: int, vocab_size: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab_size, generator=generator) * scale).to(dtype)


def _loss(case: Case, student: Tensor, teacher: Tensor) -> tuple[HeadOutput, Tensor]:
    rows, vocab_size = student.shape
    weight = torch.linspace(0.5, 1.0, rows)
    targets = LogitTargets(teacher) if case.kind == "dense" else sparse_targets(case.kind, teacher)
    leaf = student.clone().requires_grad_()
    output = logits_loss(
        leaf,
        torch.arange(rows),
        shard=VocabShard(0, vocab_size, vocab_size, None),
        lm_weight_T=weight,
        z_weight_T=0.1 * weight,
        kd=[KD(case.term, targets, weight)],
        implementation="native",
    )
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_threads_do_not_change_bits(case: Case, threads: Callable[[int], None]) -> None:
    student, teacher = (_logits(37, 251, seed, torch.bfloat16) for seed in (18, 19))
    results = []
    for count in (1, 3):
        threads(count)
        results.append(_loss(case, student, teacher))
    (one, one_gradient), (three, three_gradient) = results
    assert torch.equal(one_gradient, three_gradient)
    assert torch.equal(one.kd[0].value_T, three.kd[0].value_T)
    assert torch.equal(one.lm_T, three.lm_T)


@pytest.mark.parametrize("case", fast_one_in(8, PLAIN), ids=str)
def test_sums_do_not_lose_precision_with_the_vocabulary(case: Case) -> None:
    student, teacher = (_logits(2, 300_007, seed, scale=1.0) for seed in (16, 17))
    output, gradient = _loss(case, student, teacher)
    weight, labels = torch.linspace(0.5, 1.0, 2), torch.arange(2)
    targets = teacher if case.kind == "dense" else sparse_targets(case.kind, teacher)
    twin = logits_twin(student, labels, weight, [(case.term, targets, weight)], z_weight_T=0.1 * weight)
    for actual, expected in (
        (output.lm_T, twin.lm_T),
        (output.kd[0].value_T, twin.kd_T[0]),
        (gradient, twin.gradients[0]),
    ):
        error, size = (actual.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 1e-5 * size, f"off by {error} of {size}"


@pytest.mark.parametrize("case", fast_one_in(9, DENSE), ids=str)
def test_types_may_differ(case: Case) -> None:
    """bf16 are fp32 numbers: what one kernel makes of both must be what it makes of their fp32 copies."""
    student, teacher = (_logits(5, 83, seed, torch.bfloat16) for seed in (20, 21))
    wide, _ = _loss(case, student.float(), teacher.float())
    for pair in ((student, teacher), (student.float(), teacher), (student, teacher.float())):
        mixed, _ = _loss(case, *pair)
        torch.testing.assert_close(mixed.kd[0].value_T, wide.kd[0].value_T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_equal_models_have_no_gradient_at_any_temperature(divergence: str) -> None:
    student = _logits(5, 251, 22)
    weight = torch.ones(5)
    teacher = DenseTeacher(student.clone(), weight, KDTerm(divergence, temperature=1.7))
    chunk = Chunk(student, 251, torch.full((5,), -1), torch.zeros(5), teacher=teacher)
    rows, gradient = NATIVE.statistics_and_gradient(chunk)
    assert rows["agree"].eq(1).all()
    assert gradient.abs().max() <= 2.0**-22  # the rounding of one product, where it is fused with the subtraction


def test_statistics_of_listed_ids_only_look() -> None:
    """Statistics leave the logits unchanged, also with ids in the last, partial vector, and with all ids listed."""
    columns = torch.tensor([[34, 0, 16, 15], [-1, 40, 33, 32], [1, -1, 2, 35]])
    student = _logits(3, 35, 23)
    before = student.clone()
    chunk = Chunk(student, 35, torch.zeros(3).long(), torch.ones(3), teacher=SparseTeacher(columns, KDTerm()))
    rows = NATIVE.statistics(chunk)
    assert torch.equal(student, before)
    for row, ids in enumerate(([34, 0, 16, 15], [33, 32], [1, 2])):
        rest = before[row].clone()
        rest[ids] = -torch.inf
        assert rows["rest_max"][row] == rest.max()
        torch.testing.assert_close(rows["rest_sum"][row], (rest - rest.max()).exp().sum())
        torch.testing.assert_close(rows["lm_sum"][row], (before[row] - before[row].max()).exp().sum())
    everything = torch.arange(35).repeat(3, 1)
    rows = NATIVE.statistics(replace(chunk, teacher=SparseTeacher(everything, KDTerm())))
    assert rows["rest_max"].tolist() == [-torch.inf] * 3
    assert rows["rest_sum"].tolist() == [0.0] * 3
    assert torch.equal(rows.listed_KR.t(), before)


def test_what_it_cannot_do_it_says() -> None:
    chunk = Chunk(torch.zeros(2, 8), 8, torch.zeros(2).long(), torch.zeros(2))
    assert NATIVE.supports(chunk)
    assert not NATIVE.supports(replace(chunk, student_Rv=torch.zeros(2, 8).double()))
    assert not NATIVE.supports(replace(chunk, student_Rv=torch.zeros(2, 16)[:, ::2]))
    assert not NATIVE.supports(replace(chunk, student_Rv=torch.zeros(2, 8, device="meta")))
    assert not NATIVE.supports(replace(chunk, teacher=DenseTeacher(torch.zeros(2, 8).half(), torch.ones(2), KDTerm())))


def _arrays() -> dict[str, Any]:
    zeros: NDArray[np.float32] = np.zeros(2, np.float32)
    return {
        "sweep": "statistics",
        "student": np.zeros((2, 8), np.float32),
        "num_valid": 8,
        "labels": np.zeros(2, np.int64),
        "lm_weight": zeros,
        "z_weight": None,
        "statistics": np.zeros((3, 2), np.float32),
        "threads": 1,
    }


DENSE_ARGUMENTS = {
    "statistics": np.zeros((10, 2), np.float32),
    "teacher": np.zeros((2, 8), np.float32),
    "kd_weight": np.zeros(2, np.float32),
    "divergence": "forward_kl",
    "parameters": (0.0, 0.0),
    "student_temperature": 1.0,
    "teacher_temperature": 1.0,
    "kd_scale": 1.0,
}
SPARSE_ARGUMENTS = {
    "statistics": np.zeros((8, 2), np.float32),
    "columns": np.zeros((2, 3), np.int64),
    "student_temperature": 1.0,
    "spread": False,
}


@pytest.mark.parametrize(
    ("function", "extra", "wrong"),
    [
        ("sweep_lm", {}, {"sweep": "neither"}),
        ("sweep_lm", {}, {"sweep": "second_pass"}),
        ("sweep_lm", {}, {"num_valid": 9}),
        ("sweep_lm", {}, {"num_valid": -1}),
        ("sweep_lm", {}, {"student": np.zeros(8, np.float32)}),
        ("sweep_lm", {}, {"student": np.zeros((2, 16), np.float32)[:, ::2]}),
        ("sweep_lm", {}, {"student": np.zeros((2, 8), np.float64)}),
        ("sweep_lm", {}, {"student": np.zeros((2, 8), np.int32)}),
        ("sweep_lm", {}, {"labels": np.zeros(1, np.int64)}),
        ("sweep_lm", {}, {"labels": np.zeros(2, np.float64)}),
        ("sweep_lm", {}, {"lm_weight": np.zeros(2, np.float64)}),
        ("sweep_lm", {}, {"z_weight": np.zeros(3, np.float32)}),
        ("sweep_lm", {}, {"statistics": np.zeros((2, 2), np.float32)}),
        ("sweep_dense", DENSE_ARGUMENTS, {"teacher": np.zeros((2, 7), np.float32)}),
        ("sweep_dense", DENSE_ARGUMENTS, {"kd_weight": np.zeros(1, np.float32)}),
        ("sweep_dense", DENSE_ARGUMENTS, {"divergence": "hearsay"}),
        ("sweep_dense", DENSE_ARGUMENTS, {"divergence": "symmetric_kl"}),  # which has a column more
        (
            "sweep_dense",
            DENSE_ARGUMENTS,
            {"divergence": "adaptive_kl", "sweep": "both"},
        ),  # whose second sums are made elsewhere
        ("sweep_sparse", SPARSE_ARGUMENTS, {"columns": np.zeros((2, 4), np.int64)}),
        ("sweep_sparse", SPARSE_ARGUMENTS, {"columns": np.zeros((3, 3), np.int64)}),
        ("sweep_sparse", SPARSE_ARGUMENTS, {"columns": np.zeros((2, 3), np.int32)}),
        ("sweep_sparse", SPARSE_ARGUMENTS, {"spread": True}),  # which has two columns more
        ("sweep_sparse", SPARSE_ARGUMENTS, {"sweep": "gradient"}),  # which needs a slope
        ("sweep_sparse", SPARSE_ARGUMENTS, {"sweep": "both"}),
    ],
)
def test_arrays_that_do_not_fit_are_refused(function: str, extra: dict[str, Any], wrong: dict[str, Any]) -> None:
    sweep = getattr(_csrc, function)
    sweep(**(_arrays() | extra))
    with pytest.raises(ValueError, match="sweep: "):
        sweep(**(_arrays() | extra | wrong))

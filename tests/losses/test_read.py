"""Reading a head: log-probabilities, entropy, best ids and samples, whole and split over processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from draws import draw
from losses.head_problem import Problem, relative_error
from marks import slow
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.read import HeadReading, _stable_top, read_head
from megakd.losses.vocab_parallel import VocabShard


def _read(
    problem: Problem,
    ids_T: Tensor | None,
    top_k: int,
    uniforms_TN: Tensor | None,
    implementation: str = "auto",
    proposal_exponent: float = 1.0,
    chunk_tokens: int = 3,
) -> HeadReading:
    size = dist.get_world_size() if dist.is_initialized() else 1
    num_rows = problem.weight_VH.shape[0] // size
    start = num_rows * (dist.get_rank() if size > 1 else 0)
    return read_head(
        problem.hidden_TH,
        problem.weight_VH[start : start + num_rows],
        shard=VocabShard(start, num_rows, problem.vocab_size, dist.group.WORLD if size > 1 else None),
        ids_T=ids_T,
        entropy=True,
        top_k=top_k,
        uniforms_TN=uniforms_TN,
        proposal_exponent=proposal_exponent,
        implementation=implementation,
        chunk_bytes=chunk_tokens * num_rows * 8,
    )


def _drawn(probs_TV: Tensor, uniforms_TN: Tensor) -> Tensor:
    rows = [draw(probs_V, numbers_N) for probs_V, numbers_N in zip(probs_TV.numpy(), uniforms_TN.numpy())]
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("size", [1, slow(2), pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("vocab_size", [1, slow(2), slow(7), slow(13), 251])
def test_errors_of_the_logits_move_few_draws(world: Worlds, size: int, vocab_size: int) -> None:
    """The share of draws that an error moves grows with the bits of an id, not with the number of ids."""
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(400, 16, dtype=torch.float64), torch.randn(256, 16, dtype=torch.float64)
    problem = replace(Problem.make(torch.float64), hidden_TH=hidden_TH, weight_VH=weight_VH, vocab_size=vocab_size)
    uniforms_TN = torch.rand(400, 50, dtype=torch.float64)
    error = 1e-4
    off = replace(problem, hidden_TH=hidden_TH + error * torch.randn(400, 16, dtype=torch.float64))
    both = [
        world(size).run(_read, one, None, 0, uniforms_TN, "auto", 1.0, 100)[0].drawn_ids_TN for one in (problem, off)
    ]
    assert both[0].max() < vocab_size
    moved = (both[0] != both[1]).double().mean()
    assert moved < 4 * error * max((vocab_size - 1).bit_length(), 1)
    assert torch.equal(both[0], _drawn((hidden_TH @ weight_VH[:vocab_size].t()).softmax(-1), uniforms_TN))


@pytest.mark.parametrize("size", [1, 2, slow(4)])
@pytest.mark.parametrize(
    ("dtype", "implementation", "tolerance"),
    [(torch.float64, "auto", 1e-12), (torch.float32, "reference", 1e-5), (torch.float32, "native", 1e-5)],
)
@pytest.mark.parametrize("padded_size", [256, 512])
def test_reading_equals_the_whole(
    world: Worlds, size: int, dtype: torch.dtype, implementation: str, tolerance: float, padded_size: int
) -> None:
    problem = Problem.make(dtype, padded_size=padded_size)
    ids_T = problem.labels_T.clone()
    ids_T[3] = -100
    log_q = (problem.hidden_TH.double() @ problem.weight_VH[:251].double().t()).log_softmax(-1)
    uniforms_TN = torch.rand(7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for reading in world(size).run(_read, problem, ids_T, 100, uniforms_TN, implementation):
        expected = log_q.gather(1, ids_T.clamp(min=0)[:, None])[:, 0]
        expected[3] = 0
        assert relative_error(reading.log_prob_T, expected) < tolerance
        assert relative_error(reading.entropy_T, -(log_q.exp() * log_q).sum(-1)) < tolerance
        logits = problem.hidden_TH.double() @ problem.weight_VH[:251].double().t()
        assert relative_error(reading.log_z_T, logits.logsumexp(-1)) < tolerance
        top = log_q.topk(100, -1)
        assert torch.equal(reading.top_ids_TK, top.indices)
        assert relative_error(reading.top_log_probs_TK, top.values) < tolerance
        drawn = _drawn(log_q.exp(), uniforms_TN)
        assert torch.equal(reading.drawn_ids_TN, drawn)
        assert relative_error(reading.drawn_log_probs_TN, log_q.gather(1, drawn)) < tolerance


@pytest.mark.parametrize("size", [1, 2, slow(4)])
@pytest.mark.parametrize("exponent", [0.6, slow(1.0), slow(1.4)])
@pytest.mark.parametrize("padded_size", [256, 512])
def test_draws_from_another_power_of_the_probabilities(
    world: Worlds, size: int, exponent: float, padded_size: int
) -> None:
    problem = Problem.make(torch.float64, padded_size=padded_size)
    log_q = (problem.hidden_TH @ problem.weight_VH[:251].t()).log_softmax(-1)
    proposal = (exponent * log_q).log_softmax(-1)
    uniforms_TN = torch.rand(7, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = _drawn(proposal.exp(), uniforms_TN)
    for reading in world(size).run(_read, problem, None, 0, uniforms_TN, "auto", exponent):
        assert torch.equal(reading.drawn_ids_TN, drawn)
        assert relative_error(reading.drawn_log_probs_TN, log_q.gather(1, drawn)) < 1e-12
        assert relative_error(reading.drawn_log_proposal_TN, proposal.gather(1, drawn)) < 1e-12


@pytest.mark.parametrize("size", [1, 2, slow(4)])
def test_ties_go_to_the_smaller_id(world: Worlds, size: int) -> None:
    problem = Problem.make()
    problem.weight_VH[:] = 0.0  # all logits equal
    problem.weight_VH[200] = problem.hidden_TH[0]  # but one, for the first token
    problem.hidden_TH[1:] = 0.0
    for reading in world(size).run(_read, problem, None, 5, None):
        assert reading.log_prob_T is None and reading.drawn_ids_TN is None
        assert reading.top_ids_TK is not None
        assert reading.top_ids_TK[0].tolist() == [200, 0, 1, 2, 3]
        assert (reading.top_ids_TK[1:] == torch.arange(5)).all()


@pytest.mark.parametrize("size", [1, slow(4)])
def test_samples_follow_the_distribution_and_stay_in_the_vocabulary(world: Worlds, size: int) -> None:
    problem = Problem.make(padded_size=512)
    draws = 20_000
    uniforms_TN = torch.rand(7, draws, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniforms_TN[:, 0], uniforms_TN[:, 1] = 0.0, 1.0 - 2.0**-53
    (reading, *_) = world(size).run(_read, problem, None, 0, uniforms_TN)
    ids_TN = reading.drawn_ids_TN
    assert ids_TN is not None and ids_TN.min() >= 0 and ids_TN.max() < 251
    p = (problem.hidden_TH.double() @ problem.weight_VH[:251].double().t()).softmax(-1)
    counts = torch.zeros(7, 251, dtype=torch.float64)
    counts.scatter_add_(1, ids_TN, torch.ones(ids_TN.shape, dtype=torch.float64))
    error = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 6 * error + 1 / draws).all()


@pytest.mark.parametrize("size", [1, 2])
def test_no_tokens(world: Worlds, size: int) -> None:
    problem = Problem.make()
    none = replace(problem, hidden_TH=problem.hidden_TH[:0])
    for reading in world(size).run(_read, none, problem.labels_T[:0], 3, torch.zeros(0, 2, dtype=torch.float64)):
        assert reading.log_prob_T is not None and reading.log_prob_T.shape == (0,)
        assert reading.top_ids_TK is not None and reading.top_ids_TK.shape == (0, 3)


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_that_is_not_finite_leaves_the_others_alone(world: Worlds, size: int) -> None:
    problem = Problem.make()
    problem.weight_VH[:] = 1.0  # ties everywhere
    problem.hidden_TH[2] = torch.nan
    for reading in world(size).run(_read, problem, problem.labels_T, 4, None):
        assert reading.top_ids_TK is not None and reading.top_log_probs_TK is not None
        assert (reading.top_ids_TK == torch.arange(4)).all()
        assert reading.top_log_probs_TK.isnan().all(1).tolist() == [False, False, True, False, False, False, False]


def test_what_fills_a_small_slice_is_never_best(world: Worlds) -> None:
    """Six ids over two ranks, four of them ruled out: the best five are real ids all the same."""
    problem = replace(Problem.make(), vocab_size=6)
    problem.weight_VH[:] = 0.0
    problem = replace(problem, hidden_TH=torch.ones(7, 13), weight_VH=problem.weight_VH[:8].clone())
    problem.weight_VH[2:6] = -torch.inf
    for reading in world(2).run(_read, problem, None, 5, None):
        assert reading.top_ids_TK is not None
        assert (reading.top_ids_TK == torch.tensor([0, 1, 2, 3, 4])).all()


def test_wrong_requests_are_refused() -> None:
    problem = Problem.make()
    with pytest.raises(UsageError, match="top_k is 252"):
        _read(problem, None, 252, None)
    with pytest.raises(UsageError, match=r"weight_vH has shape \(256, 13\)"):
        read_head(problem.hidden_TH, problem.weight_VH, shard=VocabShard(0, 128, 251, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_best_ids_are_a_stable_sorts(dtype: torch.dtype) -> None:
    for size, k in ((7, 7), (13, 5), (251, 1), (4096, 100), (4096, 0)):
        values_Rv = torch.randn(32, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        values_Rv[:4] = 0.0
        values_Rv[4:12] = (values_Rv[4:12] * 2).round()  # ties by the hundreds, at the edge too
        values_Rv[12, : size // 2] = -torch.inf
        values_Rv[13] = torch.inf
        values_Rv[14, 3] = torch.nan  # has no order
        values_Rv = values_Rv.to(dtype)
        expected = values_Rv.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
        expected[14] = 0.0
        in_order = expected.sort(dim=1, descending=True, stable=True)
        best_RK, columns_RK = _stable_top(values_Rv, k)
        assert torch.equal(columns_RK, in_order.indices[:, :k])
        assert torch.equal(best_RK, in_order.values[:, :k])

"""Rows made from a teacher: the order of the cuts, honest counts, numbers that depend on nothing else."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from logits.rows import as_dicts

from megakd.errors import UsageError
from megakd.logits.codec import RowEncoder, RowFormat, identity_ranks
from megakd.logits.sparsify import (
    renormalised_samples,
    sampled_counts,
    top_p_k,
    uniform_numbers,
    weighted_samples,
)


def teacher(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """``[T, V]`` fp32 log-probabilities, some rows sharp, some flat."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 6, rows).unsqueeze(1)
    return (scale * torch.randn(rows, vocab_size, generator=generator)).log_softmax(1)


@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_top_p_k_is_the_k_best_of_the_nucleus(top_p: float) -> None:
    whole_TV = teacher(40, 97)
    top = whole_TV.topk(20, 1)
    rows = top_p_k(top.indices, top.values, torch.ones(40), top_p=top_p)
    for found, log_probs_V in zip(as_dicts(rows), whole_TV):
        order = log_probs_V.argsort(descending=True).tolist()
        nucleus, mass = [], 0.0
        for token in order:
            if mass >= top_p:
                break
            nucleus.append(token)
            mass += float(log_probs_V[token].double().exp())
        assert found == {token: float(log_probs_V[token]) for token in nucleus[:20]}
    with pytest.raises(UsageError, match="top_p 0"):
        top_p_k(top.indices, top.values, torch.ones(40), top_p=0)


def test_ids_without_mass_are_not_kept() -> None:
    log_probs_TK = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    rows = top_p_k(torch.tensor([[4, 1, 2]]), log_probs_TK, torch.zeros(1))
    assert as_dicts(rows) == [{4: 0.0}] and rows.ids_TK.shape == (1, 1)


def test_counts_of_draws() -> None:
    drawn_TN = torch.multinomial(teacher(30, 50).exp(), 25, replacement=True)
    rows = sampled_counts(drawn_TN, torch.arange(30.0))
    counts = rows.counts(25)
    for row, drawn in enumerate(drawn_TN.tolist()):
        kept = counts[row] > 0
        assert dict(zip(rows.ids_TK[row][kept].tolist(), counts[row][kept].tolist())) == Counter(drawn)
    assert rows.entropy_T.tolist() == list(range(30))


def test_renormalised_samples_are_each_id_once() -> None:
    whole_TV = teacher(30, 50)
    drawn_TN = torch.multinomial(whole_TV.exp(), 25, replacement=True)
    rows = renormalised_samples(drawn_TN, whole_TV.gather(1, drawn_TN), torch.zeros(30))
    for found, drawn, log_probs_V in zip(as_dicts(rows), drawn_TN.tolist(), whole_TV):
        ids = sorted(set(drawn))
        expected = log_probs_V[ids].log_softmax(0)
        assert list(found) == ids
        assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_shares_of_draws_are_unbiased() -> None:
    """The mean over many positions with one distribution is that distribution, within the error of a mean."""
    probs_V = teacher(3, 11)[1].exp().double()
    numbers_TN = uniform_numbers(np.arange(4000), 50, seed=1, dataset="d")
    drawn_TN = torch.searchsorted(probs_V.cumsum(0), torch.from_numpy(numbers_TN), right=True).clamp(max=10)
    rows = sampled_counts(drawn_TN, torch.zeros(4000))
    shares_V = np.bincount(rows.ids_TK.ravel(), np.exp(rows.log_probs_TK.astype(np.float64)).ravel(), 11) / 4000
    error_V = np.sqrt(probs_V.numpy() / (4000 * 50))
    assert (np.abs(shares_V - probs_V.numpy()) < 5 * error_V).all()


def test_numbers_depend_on_seed_dataset_position_and_draw_alone() -> None:
    positions = np.array([0, 1, 2**40, 7])
    numbers = uniform_numbers(positions, 60, seed=3, dataset="abc")
    assert numbers.dtype == np.float64 and numbers.shape == (4, 60) and (numbers >= 0).all() and (numbers < 1).all()
    shuffled = uniform_numbers(positions[::-1], 60, seed=3, dataset="abc")[::-1]
    np.testing.assert_array_equal(numbers, shuffled)
    np.testing.assert_array_equal(numbers[:, :9], uniform_numbers(positions, 9, seed=3, dataset="abc"))
    for other in (
        uniform_numbers(positions, 60, seed=4, dataset="abc"),
        uniform_numbers(positions, 60, seed=3, dataset="abd"),
    ):
        assert not (numbers == other).any()
    # these bits are part of every store of samples
    assert [float(x).hex() for x in numbers[2, :2]] == RECORDED


RECORDED = ["0x1.58ecead7efeffp-1", "0x1.e3340e9fb058fp-1"]


def test_numbers_are_uniform_and_independent() -> None:
    numbers = uniform_numbers(np.arange(20000), 8, seed=0, dataset="x")
    counts = np.histogram(numbers, 64, (0, 1))[0]
    expected = numbers.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)
    correlations = np.corrcoef(np.concatenate([numbers.T, np.roll(numbers, 1, 0).T]))
    assert np.abs(correlations - np.eye(16)).max() < 5 / np.sqrt(20000)


@pytest.mark.parametrize("exponent", [0.5, 0.8, 1.2])
def test_weighted_draws_are_unbiased(exponent: float) -> None:
    log_probs_V = teacher(3, 11)[1].double()
    log_proposal_V = (exponent * log_probs_V).log_softmax(0)
    numbers_TN = torch.from_numpy(uniform_numbers(np.arange(4000), 50, seed=1, dataset="d"))
    drawn_TN = torch.searchsorted(log_proposal_V.exp().cumsum(0), numbers_TN, right=True).clamp(max=10)
    rows = weighted_samples(drawn_TN, log_probs_V[drawn_TN], log_proposal_V[drawn_TN], torch.zeros(4000))
    weights_V = (log_probs_V - log_proposal_V).exp()
    for found, drawn_N in zip(as_dicts(rows)[:100], drawn_TN):
        expected = {token: np.log(n / 50 * float(weights_V[token])) for token, n in Counter(drawn_N.tolist()).items()}
        assert found == pytest.approx(expected, abs=1e-5)
    shares_V = np.bincount(rows.ids_TK.ravel(), np.exp(rows.log_probs_TK.astype(np.float64)).ravel(), 11) / 4000
    error_V = (log_probs_V.exp() * weights_V / (4000 * 50)).sqrt().numpy()
    assert (np.abs(shares_V - log_probs_V.exp().numpy()) < 5 * error_V).all()


def test_weighted_draws_beyond_what_a_store_holds_are_cut() -> None:
    """An id of p = 1e-8, drawn under q = 1e-12, carries 200 in one draw of 50: no capture may end of it."""
    drawn_TN, log_probs_TN = torch.arange(50).expand(2, 50), torch.full((2, 50), math.log(0.01))
    log_probs_TN[0, 7] = math.log(1e-8)
    rows = weighted_samples(drawn_TN, log_probs_TN, log_probs_TN * 1.5, torch.ones(2))
    mass_T = np.exp(rows.log_probs_TK.astype(np.float64)).sum(1)
    np.testing.assert_allclose(mass_T, [64 + 9.8, 10], rtol=1e-5)  # of the 50 ids one is cut
    RowEncoder(RowFormat("samples", 8, draws=50, weighted=True, rounding="random"), identity_ranks(50)).add(rows)

"""Rows of a logits store from the readings of an output head: best ids cut by mass, or draws.

Axes: ``T`` token positions, ``K`` best ids or slots, ``N`` draws.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megakd.errors import UsageError
from megakd.logits.codec import WEIGHT_UNIT, Rows
from megakd.logits.rounding import RandomRounding
from megakd.splitmix64 import GOLDEN, mix64, states_at


def top_p_k(ids_TK: Tensor, log_probs_TK: Tensor, entropy_T: Tensor, *, top_p: float = 1.0) -> Rows:
    """Cut the K best ids to the shortest prefix whose mass under the whole softmax reaches ``top_p``.

    ids_TK, log_probs_TK: int64 and fp32, best first, from ``losses.read``. So top-k applies first, then top-p (arXiv
        2410.16215, appendix), which gives the k best ids of the nucleus.
    top_p: in (0, 1]. If K ids do not reach it all are kept; 1.0 keeps all ids with any mass.

    Raises UsageError for a ``top_p`` outside (0, 1].
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p {top_p}: expected more than 0, at most 1")
    ids, log_probs = _array(ids_TK), _array(log_probs_TK).astype(np.float32)
    mass = np.exp(log_probs.astype(np.float64))
    before = np.cumsum(mass, axis=1) - mass
    if top_p < 1:
        log_probs = np.where(before < top_p, log_probs, np.float32(-np.inf))
    widest = int((log_probs > -np.inf).sum(1).max(initial=0))
    return Rows(ids[:, :widest], log_probs[:, :widest], _array(entropy_T).astype(np.float32))


def sampled_counts(drawn_ids_TN: Tensor, entropy_T: Tensor) -> Rows:
    """Make rows of the kind ``samples``: the number of times each id was drawn, over N (arXiv 2503.16870)."""
    drawn = _array(drawn_ids_TN)
    ids, counts, _ = _runs(drawn)
    return Rows.from_counts(ids, counts, _array(entropy_T).astype(np.float32), draws=drawn.shape[1])


def weighted_samples(
    drawn_ids_TN: Tensor,
    log_probs_TN: Tensor,
    log_proposal_TN: Tensor,
    entropy_T: Tensor,
    *,
    rounding: RandomRounding | None = None,
) -> Rows:
    """Make rows of the kind ``samples`` from draws of another distribution q than the teacher's p.

    Each id carries count/N · p/q (arXiv 2503.16870), so its mass is p on average; a row sums to 1 on average only. The
    mass of an id is cut at ``WEIGHT_UNIT``, the most that a store holds. (With an exponent of 1.5 only an id of
    p = 1e-8 can weigh more, once in a hundred thousand rows.)

    log_probs_TN, log_proposal_TN: log-probabilities of the drawn ids under p and q.
    rounding: rounding to masses that a store holds; None for none.
    """
    drawn = _array(drawn_ids_TN)
    ids, counts, slots = _runs(drawn)
    weights = _array(log_probs_TN).astype(np.float64) - _array(log_proposal_TN).astype(np.float64)
    log_weights = np.zeros(counts.shape)
    np.put_along_axis(log_weights, slots, weights, 1)
    with np.errstate(divide="ignore"):
        shares = np.log(counts / drawn.shape[1]) + log_weights
    shares = np.minimum(shares, math.log(WEIGHT_UNIT))
    if rounding is not None:
        shares = rounding.round(shares, ids)
    return Rows(ids, shares.astype(np.float32), _array(entropy_T).astype(np.float32))


def renormalised_samples(drawn_ids_TN: Tensor, log_probs_TN: Tensor, entropy_T: Tensor) -> Rows:
    """Make rows of the distinct ids that were drawn, with probabilities renormalised to 1 (Gemma 3, arXiv 2503.19786).

    By construction not an unbiased estimate: an id carries more than p wherever it was drawn, and likely ids always
    are.

    log_probs_TN: log-probabilities of the drawn ids under the whole softmax.
    """
    ids, counts, slots = _runs(_array(drawn_ids_TN))
    log_probs = np.full(counts.shape, -np.inf)
    np.put_along_axis(log_probs, slots, _array(log_probs_TN).astype(np.float64), 1)
    largest = log_probs.max(1, keepdims=True)
    log_probs -= largest + np.log(np.exp(log_probs - largest).sum(1, keepdims=True))
    return Rows(ids, log_probs.astype(np.float32), _array(entropy_T).astype(np.float32))


def uniform_numbers(
    token_positions: NDArray[np.int64], num_draws: int, *, seed: int, dataset: str
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 ``[T, N]``, that decide the draws at each token position.

    A function of seed, fingerprint of the dataset, token position and number of the draw alone: for each position the
    stream of a splitmix64 generator (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")
    whose state is a hash of seed, dataset and position.
    """
    states = states_at(token_positions, f"draws {seed} {dataset}")
    steps = np.arange(1, num_draws + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return (mix64(states[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _runs(drawn: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
    """Distinct ids of each row, rising, and their counts, ``[T, K]`` each; and the slot of each draw, ``[T, N]``."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, 1)
    starts = np.ones(ordered.shape, np.bool_)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slots = np.empty_like(order)
    np.put_along_axis(slots, order, np.cumsum(starts, axis=1) - 1, 1)
    widest = int(slots.max(initial=-1)) + 1
    ids = np.zeros((len(drawn), widest), np.int64)
    counts = np.zeros((len(drawn), widest), np.int32)
    np.put_along_axis(ids, slots, drawn, 1)
    np.add.at(counts, (np.arange(len(drawn))[:, None], slots), 1)
    return ids, counts, slots


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array

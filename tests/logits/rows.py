"""Rows for the tests of the logits store: made-up teachers of any vocabulary, and what rows say, as dictionaries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megakd.logits.codec import Rows


def random_rows(
    seed: int, num_rows: int, vocab_size: int, width: int, *, ragged: bool = True, sharpness: float = 2.0
) -> Rows:
    """Log-probabilities of the best ids of random logits over a part of the vocabulary, low ids more likely."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(vocab_size)[:width] for _ in range(num_rows)])
    if vocab_size > 4 * width:
        drawn = [np.unique((vocab_size ** rng.random(4 * width)).astype(np.int64) - 1) for _ in range(num_rows)]
        ids = np.stack([rng.permutation(np.union1d(row, other))[:width] for row, other in zip(drawn, ids)])
    logits = sharpness * rng.standard_normal((num_rows, width))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log(rng.uniform(0.3, 1, (num_rows, 1)))
    if ragged:
        sizes = rng.integers(0, width + 1, num_rows)
        log_probs[np.arange(width) >= sizes[:, None]] = -np.inf
    return Rows(ids.astype(np.int64), log_probs.astype(np.float32), rng.uniform(0, 12, num_rows).astype(np.float32))


def random_counts(seed: int, num_rows: int, vocab_size: int, draws: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids ``[T, K]`` and how often each was drawn, 0 where none was."""
    rng = np.random.default_rng(seed)
    drawn = np.minimum((vocab_size ** rng.random((num_rows, draws))).astype(np.int64), vocab_size - 1)
    found = [np.unique(row, return_counts=True) for row in drawn]
    width = max(len(ids) for ids, _ in found)
    ids, counts = np.zeros((num_rows, width), np.int64), np.zeros((num_rows, width), np.int32)
    for row, (row_ids, row_counts) in enumerate(found):
        ids[row, : len(row_ids)], counts[row, : len(row_ids)] = row_ids, row_counts
    return ids, counts


def as_dicts(rows: Rows) -> list[dict[int, float]]:
    """Content of each row: id -> log-probability."""
    kept = rows.log_probs_TK > -np.inf
    return [
        dict(zip(ids[keep].tolist(), values[keep].tolist()))
        for ids, values, keep in zip(rows.ids_TK, rows.log_probs_TK, kept)
    ]

"""The slow twin of drawing: the vocabulary halved again and again, each half by its mass and a number of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megakd.splitmix64 import mix64


def draw(probs_V: NDArray[np.float64], numbers_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """One id for each number in [0, 1), which are multiples of 2^-53."""
    vocab_size = len(probs_V)
    below = np.concatenate([[0.0], np.cumsum(probs_V)])
    seeds_N = (numbers_N * 2.0**53).astype(np.uint64)
    first_N = np.zeros(len(numbers_N), np.int64)
    for level in reversed(range((vocab_size - 1).bit_length())):
        middle_N = first_N + 2**level
        edges = [below[np.minimum(edge, vocab_size)] for edge in (first_N, middle_N, middle_N + 2**level)]
        lower_N, upper_N = edges[1] - edges[0], edges[2] - edges[1]
        golden = np.uint64((level + 1) * 0x9E3779B97F4A7C15 % 2**64)
        share_N = (mix64(seeds_N + golden) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        first_N = np.where(share_N * (lower_N + upper_N) >= lower_N, middle_N, first_N)
    return first_N

"""The 64-bit mixer behind every pseudo-random draw and order, as in splitmix64."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""Increment of splitmix64's state at each step."""
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix each value by a bijection of uint64 in which every bit depends on all bits; same shape.

    It is the finaliser of MurmurHash3 in Stafford's variant 13, as in splitmix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators").
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return value ^ (value >> np.uint64(31))


def states_at(token_positions: NDArray[np.int64], purpose: str) -> NDArray[np.uint64]:
    """``[T]`` uint64: the state of a splitmix64 generator for each token position; other states for another purpose."""
    key = np.uint64(xxhash.xxh3_64_intdigest(purpose.encode()))
    positions = np.asarray(token_positions, np.int64).astype(np.uint64)
    states: NDArray[np.uint64] = mix64(mix64(positions ^ key) + key)
    return states

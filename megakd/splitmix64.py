"""The one hash that draws and orders are made of."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
"""What splitmix64 adds to its state at each step."""
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of uint64 that spreads every bit over all: the finaliser of MurmurHash3 in Stafford's variant 13, as
    in splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return value ^ (value >> np.uint64(31))


def states_at(token_positions: NDArray[np.int64], purpose: str) -> NDArray[np.uint64]:
    """``[T]``: of each token position the state of a splitmix64 generator, another one for each purpose."""
    key = np.uint64(xxhash.xxh3_64_intdigest(purpose.encode()))
    positions = np.asarray(token_positions, np.int64).astype(np.uint64)
    states: NDArray[np.uint64] = mix64(mix64(positions ^ key) + key)
    return states

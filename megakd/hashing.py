"""The one hash that draws and orders are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of uint64 that spreads every bit over all: the finaliser of MurmurHash3 in Stafford's variant 13, as
    in splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))

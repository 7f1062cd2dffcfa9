"""A sample of the samples: which of them are scored where scoring all would cost too much."""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.data.order import permute


def draw_sample(num_samples: int, *, fraction: float, seed: int) -> NDArray[np.int64]:
    """``round(fraction * num_samples)`` ids, at least one, sorted: a pure function of the three.

    A larger fraction holds every id of a smaller one with the same seed.
    """
    count = max(1, round(fraction * num_samples))
    # A key of its own: with the plain seed these would be the samples that a training run sees first.
    key = xxhash.xxh3_64_intdigest(f"scored sample {seed}".encode()) >> 2
    return np.sort(permute(np.arange(count), num_samples=num_samples, seed=key, epoch=0))

"""Order of samples: a keyed permutation, computed for each place of an epoch and stored nowhere."""

from __future__ import annotations

import math
import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.splitmix64 import mix64

_ROUNDS = 8


def permute(index: NDArray[np.int64] | int, *, num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Samples at the places ``index`` of an epoch: a keyed permutation of ``range(num_samples)``.

    A Feistel network over the mixed radix (a, b), a ~ sqrt(num_samples), a * b >= num_samples, whose rounds add a hash
    of one digit to the other; results beyond the range are encrypted again until they fall inside ("cycle walking"),
    which keeps it a bijection for every ``num_samples`` (Black and Rogaway 2002, "Ciphers with Arbitrary Finite
    Domains"). Nothing is stored, whatever the size. Returns int64 in the shape of ``index``.
    """
    places = np.asarray(index, dtype=np.int64)
    flat = places.reshape(-1)
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < num_samples:
        raise IndexError(f"places {flat.min()} to {flat.max()} of {num_samples} samples")
    radix_low = math.isqrt(max(num_samples - 1, 0)) + 1
    radix_high = -(-num_samples // radix_low)
    keys = [np.uint64(xxhash.xxh3_64_intdigest(struct.pack("<qqq", seed, epoch, round))) for round in range(_ROUNDS)]
    result = _encrypt(flat.astype(np.uint64), radix_low, radix_high, keys)
    outside = np.flatnonzero(result >= num_samples)
    while len(outside):
        result[outside] = _encrypt(result[outside], radix_low, radix_high, keys)
        outside = outside[result[outside] >= num_samples]
    return result.astype(np.int64).reshape(places.shape)


def _encrypt(value: NDArray[np.uint64], radix_low: int, radix_high: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    low, high = np.uint64(radix_low), np.uint64(radix_high)
    y, x = np.divmod(value, low)
    for key_x, key_y in zip(keys[::2], keys[1::2]):
        x = (x + mix64(y ^ key_x) % low) % low
        y = (y + mix64(x ^ key_y) % high) % high
    return y * low + x

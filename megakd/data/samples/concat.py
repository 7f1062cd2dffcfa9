"""Samples: contiguous ranges of a dataset's token stream, and the keyed permutation that orders them."""

from __future__ import annotations

import math
import struct
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import UsageError
from megakd.splitmix64 import mix64

_ROUNDS = 8


class Samples(Protocol):
    """What the loader asks of a packing of one dataset."""

    dataset: IndexedDataset
    seq_length: int
    num_samples: int
    packing: str

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n, seq_length + 1]`` int64: the samples' tokens, one more than the model sees, for the last label.

        A row ends in zeros, which count as no label, where its sample is shorter.
        """

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the tokens of each sample, from 2 to ``seq_length + 1``."""

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position at which each sample starts."""

    def prefetch(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the kernel to have the samples in memory soon."""


class ConcatSamples:
    """Sample *i* is the tokens ``[i * seq_length, i * seq_length + seq_length]``: no index, no state.

    The last token of one sample is the first of the next: every token but the first of the dataset is a label once.
    Raises UsageError where the dataset is too short for one sample.
    """

    packing = "concat"

    def __init__(self, dataset: IndexedDataset, seq_length: int) -> None:
        if seq_length < 1:
            raise UsageError(f"seq_length {seq_length}: expected at least 1")
        self.dataset = dataset
        self.seq_length = seq_length
        self.num_samples = max(0, (dataset.num_tokens - 1) // seq_length)
        if self.num_samples == 0:
            raise UsageError(
                f"{dataset.prefix}: {dataset.num_tokens} tokens do not make one sample of seq_length {seq_length} "
                f"(it takes {seq_length + 1}); use more data or a smaller --seq-length"
            )
        itemsize = dataset.dtype.itemsize
        # One overlapping row a sample, made by strides alone: reading samples is then a gather of rows.
        self._rows: NDArray[Any] = np.lib.stride_tricks.as_strided(
            dataset.tokens,
            (self.num_samples, seq_length + 1),
            (seq_length * itemsize, itemsize),
            writeable=False,
        )

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position at which each sample starts."""
        return np.asarray(sample_ids, dtype=np.int64) * self.seq_length

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: ``seq_length + 1`` for all."""
        return np.full(len(sample_ids), self.seq_length + 1, dtype=np.int64)

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n, seq_length + 1]`` int64. Raises IndexError for an id that is not a sample's."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        rows = np.empty((len(ids), self.seq_length + 1), dtype=np.int64)
        for row, sample in enumerate(ids.tolist()):
            if not 0 <= sample < self.num_samples:
                raise IndexError(f"sample {sample} of {self.num_samples}")
            rows[row] = self._rows[sample]
        return rows

    def prefetch(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the kernel to have the samples in memory soon."""
        for start in self.starts(sample_ids).tolist():
            self.dataset.prefetch(start, start + self.seq_length + 1)


def permute(index: NDArray[np.int64] | int, *, num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The sample that stands at place ``index`` of an epoch: a keyed permutation of ``range(num_samples)``.

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

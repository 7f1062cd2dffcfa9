"""Samples of different lengths, each told by the token positions at which it starts and ends."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import UsageError


class RangeSamples(ABC):
    """`Samples` of different lengths; a subclass gives the token positions at which they start and end."""

    packing: str

    def __init__(self, dataset: IndexedDataset, seq_length: int, num_samples: int) -> None:
        if seq_length < 1:
            raise UsageError(f"seq_length {seq_length}: expected at least 1")
        self.dataset = dataset
        self.seq_length = seq_length
        self.num_samples = num_samples

    @abstractmethod
    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position at which each sample starts."""

    @abstractmethod
    def ends(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position after the last token of each sample."""

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the tokens of each sample, at most ``seq_length + 1``."""
        return self.ends(sample_ids) - self.starts(sample_ids)

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples: ``[n, seq_length + 1]`` int64, zeros after each. Raises IndexError for an id out of range."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        rows = np.zeros((len(ids), self.seq_length + 1), dtype=np.int64)
        for row, (start, end) in zip(rows, zip(self.starts(ids).tolist(), self.ends(ids).tolist())):
            row[: end - start] = self.dataset.tokens[start:end]
        return rows

    def prefetch(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the kernel to have the samples in memory soon."""
        for start, end in zip(self.starts(sample_ids).tolist(), self.ends(sample_ids).tolist()):
            self.dataset.prefetch(start, end)

    def _checked(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ids = np.asarray(sample_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.num_samples)]
        if len(outside):
            raise IndexError(f"sample {outside[0]} of {self.num_samples}")
        return ids

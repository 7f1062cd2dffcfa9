"""Concat packing: windows of the token stream, one behind the other, without regard to documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import UsageError


class ConcatSamples:
    """Samples of equal length: *i* is the tokens ``[i * seq_length, i * seq_length + seq_length]``, both included.

    The last token of a sample is the first of the next, so every token of the dataset but the first is a label once.
    Nothing is stored. Raises UsageError if the dataset is too short for one sample.
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
        # One overlapping row for each sample, by strides alone: reading samples is then a gather of rows.
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
        """``[n]`` int64: ``seq_length + 1`` for every sample."""
        return np.full(len(sample_ids), self.seq_length + 1, dtype=np.int64)

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples: ``[n, seq_length + 1]`` int64. Raises IndexError for an id out of range."""
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

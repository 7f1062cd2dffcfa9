"""Samples of one dataset, as the loader reads them, whatever the packing."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset


class Samples(Protocol):
    """One dataset cut into samples by a packing: contiguous ranges of its token stream, numbered from 0."""

    dataset: IndexedDataset
    seq_length: int
    num_samples: int
    packing: str

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples: ``[n, seq_length + 1]`` int64, one token more than the model sees, for the last label.

        The row of a shorter sample is filled with zeros, which are no labels.
        """

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the tokens of each sample, from 2 to ``seq_length + 1``."""

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position at which each sample starts."""

    def prefetch(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the kernel to have the samples in memory soon."""

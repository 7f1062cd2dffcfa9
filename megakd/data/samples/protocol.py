"""Samples of one dataset, as the loader reads them, whatever the packing."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset


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

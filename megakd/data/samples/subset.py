"""Samples that are some of other samples, read from where those lie."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from megakd.data.samples.protocol import Samples


class SubsetSamples(ABC):
    """`Samples` that are some of ``source``: a subclass says which, and sets ``num_samples`` and ``packing``."""

    num_samples: int
    packing: str

    def __init__(self, source: Samples) -> None:
        self.source = source
        self.dataset = source.dataset
        self.seq_length = source.seq_length

    @abstractmethod
    def source_ids(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the ids of the samples in the source. Raises IndexError for an id out of range."""

    def read(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read samples: ``[n, seq_length + 1]`` int64."""
        return self.source.read(self.source_ids(sample_ids))

    def lengths(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the tokens of each sample."""
        return self.source.lengths(self.source_ids(sample_ids))

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the token position at which each sample starts."""
        return self.source.starts(self.source_ids(sample_ids))

    def prefetch(self, sample_ids: NDArray[np.int64]) -> None:
        """Ask the kernel to have the samples in memory soon."""
        self.source.prefetch(self.source_ids(sample_ids))

"""Samples that a selection keeps, read from where they lie, and the way back to all samples of the dataset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megakd.data.samples.protocol import Samples
from megakd.data.samples.split import PartSamples
from megakd.data.samples.subset import SubsetSamples
from megakd.data.selection import Selection
from megakd.errors import UsageError


class SelectedSamples(SubsetSamples):
    """Samples of ``samples`` that a selection keeps: *i* is sample ``selection.ids[i]`` of the source.

    ``packing`` names the selection, so that a data order cannot be continued with another one.

    Raises MismatchError for a selection from another dataset or packing, UsageError for an empty selection.
    """

    def __init__(self, samples: Samples, selection: Selection) -> None:
        selection.check(
            samples.dataset,
            packing=samples.packing,
            seq_length=samples.seq_length,
            num_samples=samples.num_samples,
        )
        if not len(selection):
            raise UsageError(f"{selection.folder}: the selection keeps no sample of {samples.dataset.prefix}")
        super().__init__(samples)
        self.num_samples = len(selection)
        self.packing = f"{samples.packing}, selection {selection.fingerprint}"
        self.selection = selection

    def source_ids(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: the ids of the samples in the source."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        if len(ids) and ids.min() < 0:
            raise IndexError(f"sample {ids.min()} of {self.num_samples}")
        return np.asarray(self.selection.ids[ids])


def unselected(samples: Samples) -> Samples:
    """All samples of the dataset that a selection, or a part, was taken from; other samples are returned unchanged.

    Scores, selections and stores on disk are addressed by the ids of all samples.
    """
    while isinstance(samples, SubsetSamples):
        samples = samples.source
    return samples


def ids_in_dataset(samples: Samples, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[n]`` int64: the ids of the samples ``sample_ids`` among all samples of the dataset."""
    while isinstance(samples, SubsetSamples):
        sample_ids = samples.source_ids(sample_ids)
        samples = samples.source
    return sample_ids


def selection_of(samples: Samples) -> Selection | None:
    """Selection by which these samples, or those that they are a part of, were taken; None without one."""
    while isinstance(samples, PartSamples):
        samples = samples.source
    return samples.selection if isinstance(samples, SelectedSamples) else None

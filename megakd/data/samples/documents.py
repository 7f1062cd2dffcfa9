"""Document packing: every document of a dataset is one sample."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.ranges import RangeSamples
from megakd.errors import UsageError

_CHUNK = 1 << 18


class DocumentSamples(RangeSamples):
    """Samples for datasets whose documents are samples already, such as refined ones: *i* is document *i*.

    Nothing is stored. A document of fewer than two tokens is a sample without labels.

    Raises UsageError for a document of more than ``seq_length + 1`` tokens, and for a dataset without documents.
    """

    packing = "document"

    def __init__(self, dataset: IndexedDataset, seq_length: int) -> None:
        super().__init__(dataset, seq_length, dataset.num_documents)
        if self.num_samples == 0:
            raise UsageError(f"{dataset.prefix}: no documents, so no samples")
        for first in range(0, self.num_samples, _CHUNK):
            ids = np.arange(first, min(first + _CHUNK, self.num_samples))
            lengths = self.lengths(ids)
            if lengths.max() > seq_length + 1:
                long = int(np.argmax(lengths > seq_length + 1))
                raise UsageError(
                    f"{dataset.prefix}: document {first + long} has {lengths[long]} tokens, a sample of seq_length "
                    f"{seq_length} at most {seq_length + 1}; raise --seq-length, or use another --packing"
                )

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.dataset.document_starts(self._checked(sample_ids))

    def ends(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.dataset.document_starts(self._checked(sample_ids) + 1)

"""Bytes of text that labels stand for, by the bytes of the documents that they lie in; for bits per byte.

A label is a token at a token position; it has its share of the bytes of its document (`data.indexed.text_bytes`). The
sum over all labels of a dataset is the bytes of its text, less the share of the very first token, which is no label.
Axes: ``N`` samples, ``S`` positions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import NO_TEXT_BYTES
from megakd.data.indexed.text_bytes import bytes_of_ranges
from megakd.data.samples.protocol import Samples

BYTES_OF = "documents"
"""Name of the rule by which bytes are counted here, for records: figures by another rule do not compare."""


def label_bytes(
    samples: Samples,
    sample_ids: NDArray[np.int64],
    loss_mask_NS: NDArray[np.bool_],
    offsets: NDArray[np.int64] | None = None,
) -> int:
    """Bytes of text of the labels that ``loss_mask_NS`` keeps.

    sample_ids: ``[N]``. loss_mask_NS: true where the label counts; the label of position *j* of a row is the token
    *j* + 1 behind the row's first one. offsets: ``[N]``, tokens of the sample in front of the row; None for none.

    Raises UsageError for a dataset without the bytes of its documents, CorruptError for damaged ones.
    """
    firsts = samples.starts(sample_ids) if offsets is None else samples.starts(sample_ids) + offsets
    total = 0
    for first, mask in zip(firsts.tolist(), loss_mask_NS):
        labels = first + 1 + np.flatnonzero(mask)
        total += int(bytes_of_ranges(samples.dataset, labels, labels + 1).sum())
    return total


def why_no_bytes(datasets: Iterable[Samples]) -> str | None:
    """Reason why bits per byte of these datasets cannot be told, for people; None where all record their bytes.

    Hashes the files with the bytes: raises CorruptError for a damaged one.
    """
    for samples in datasets:
        if samples.dataset.text_bytes is None:
            return f"{samples.dataset.prefix}: {NO_TEXT_BYTES}"
    return None

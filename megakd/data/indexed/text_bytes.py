"""Bytes of the original text: of each document, in the file ``<prefix>.bytes``, and of ranges of the token stream.

``<prefix>.bytes`` is i64 ``[num_documents]``, little-endian: UTF-8 bytes of the text that each document was tokenized
from. No tokenizer can tell them from the tokens: it may have normalised the text, dropped white space, or have no id
for a letter.

A range of tokens has the bytes of its documents. A document that it cuts gives each of its ``n`` tokens, an
end-of-document id included, an equal share of its ``b`` bytes, rounded so that the shares of all parts add up: tokens
``i`` to ``j - 1`` of it have ``floor(b * j / n) - floor(b * i / n)``. The bytes of a document without tokens belong to
the token in front of it, or to the first of all.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset


def bytes_of_ranges(dataset: IndexedDataset, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[n]`` int64: bytes of the text of the token positions ``starts[i]`` to ``stops[i] - 1``.

    starts, stops: ``[n]`` int64 within the dataset, ``starts[i] <= stops[i]``. The index is read between the least and
    the largest of them alone, and ranges that adjoin add up exactly.

    Raises UsageError for a dataset without the bytes of its documents, CorruptError for damaged ones.
    """
    text_bytes = dataset.require_text_bytes()
    if not len(starts):
        return np.zeros(0, dtype=np.int64)
    low, high = int(starts.min()), int(stops.max())
    documents = range(dataset.num_documents)
    first = 0 if low == 0 else bisect_right(documents, low, key=lambda document: dataset.document_start(document + 1))
    last = bisect_right(documents, high, lo=first, key=lambda document: dataset.document_start(document + 1))
    last = min(last + 1, dataset.num_documents)  # the document that `high` lies in
    bounds = dataset.document_starts(np.arange(first, last + 1))
    before = np.concatenate(([0], np.cumsum(text_bytes[first:last])))
    left, right = (_bytes_before(positions, bounds, before) for positions in (starts, stops))
    return right - left


def _bytes_before(
    positions: NDArray[np.int64], bounds: NDArray[np.int64], before: NDArray[np.int64]
) -> NDArray[np.int64]:
    """``[n]`` int64: bytes in front of each position, counted from the first of ``m`` documents.

    bounds: ``[m + 1]``, where each document starts and the last one ends. before: ``[m + 1]``, bytes in front of each.
    """
    ended = np.searchsorted(bounds[1:], positions, side="right")  # documents that end at the position or before it
    result = before[ended]
    inside = np.flatnonzero((ended < len(bounds) - 1) & (bounds[ended] < positions))
    document = ended[inside]
    tokens, size = bounds[document + 1] - bounds[document], before[document + 1] - before[document]
    each, rest = np.divmod(size, tokens)  # apart, because bytes times tokens may leave 64 bits
    place = positions[inside] - bounds[document]
    result[inside] += each * place + rest * place // tokens
    result[positions == 0] = 0
    return result

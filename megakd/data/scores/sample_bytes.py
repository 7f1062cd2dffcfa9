"""Bytes of text that the scored labels of each sample stand for, by which ``--normalise byte`` divides NLLs.

A token has the bytes that its id decodes to, scaled within its document so that these add up to the bytes of the
original text, where the dataset records them: ids of a tokenizer that normalises, drops white space or does not know a
letter decode to other bytes than the text had. A tokenizer that loses nothing has a scale of 1.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.boundaries import starts_between
from megakd.data.samples.protocol import Samples

_SAMPLES_AT_ONCE = 1 << 12
_TOKENS_AT_ONCE = 1 << 22


def sample_bytes(
    samples: Samples, token_bytes: NDArray[np.int32], *, skip_after: int | None, skip_starts: bool = False
) -> NDArray[np.int32]:
    """``[num_samples]`` int32: bytes of text that the labels of each sample stand for, in a temporary file.

    token_bytes: ``[vocab_size]``, `Tokenizer.token_bytes`. skip_after: labels behind this id were not scored and do not
    count. skip_starts: nor do the labels with which documents of the index start.

    Raises CorruptError for damaged bytes of documents.
    """
    with tempfile.TemporaryFile() as stream:
        stream.truncate(4 * samples.num_samples)
        sizes: NDArray[np.int32] = np.memmap(stream, "<i4", "r+", shape=(samples.num_samples,))
    of_tokens = _TokenBytes(samples.dataset, token_bytes)
    for first in range(0, samples.num_samples, _SAMPLES_AT_ONCE):
        ids = np.arange(first, min(first + _SAMPLES_AT_ONCE, samples.num_samples))
        starts = samples.starts(ids)
        ends = starts + samples.lengths(ids)
        base, stop = int(starts[0]), int(ends[-1])
        bytes_each = of_tokens.between(base, stop)
        if skip_after is not None:
            bytes_each[1:][samples.dataset.tokens[base : max(base, stop - 1)] == skip_after] = 0
        if skip_starts:
            bytes_each[starts_between(samples.dataset, base, stop) - base] = 0
        before = np.concatenate(([0], np.cumsum(bytes_each)))
        # documents without tokens have no first one
        sizes[ids] = np.rint(before[ends - base] - before[np.minimum(starts + 1, ends) - base])
    return sizes


class _TokenBytes:
    """Bytes of each token of a dataset."""

    def __init__(self, dataset: IndexedDataset, token_bytes: NDArray[np.int32]) -> None:
        self._dataset, self._token_bytes = dataset, token_bytes
        self._text_bytes = dataset.text_bytes
        self._decoded: dict[int, int] = {}  # of documents that ranges have cut

    def between(self, start: int, stop: int) -> NDArray[np.float64]:
        """``[stop - start]`` float64: bytes of the tokens from ``start`` on; whole numbers where nothing is scaled."""
        weights: NDArray[np.float64] = self._token_bytes[self._dataset.tokens[start:stop]].astype(np.float64)
        if self._text_bytes is None or start == stop:
            return weights
        documents, start_of = range(self._dataset.num_documents), self._dataset.document_start
        first = bisect_right(documents, start, key=lambda document: start_of(document + 1))
        last = bisect_left(documents, stop, lo=first, key=start_of)
        bounds = self._dataset.document_starts(np.arange(first, last + 1))
        inside = np.clip(bounds - start, 0, stop - start)
        before = np.concatenate(([0], np.cumsum(weights)))
        decoded = before[inside[1:]] - before[inside[:-1]]
        for place in {0, last - first - 1}:
            if bounds[place] < start or bounds[place + 1] > stop:
                decoded[place] = self._decoded_bytes(first + place)
        lengths, nothing = np.diff(inside), decoded == 0
        weights[np.repeat(nothing, lengths)] = 1  # a document of ids without text: equal parts
        decoded[nothing] = np.diff(bounds)[nothing]
        weights *= np.repeat(self._text_bytes[first:last] / np.maximum(decoded, 1), lengths)
        return weights

    def _decoded_bytes(self, document: int) -> int:
        """Bytes that the ids of a document decode to."""
        if document not in self._decoded:
            start, stop = self._dataset.document_start(document), self._dataset.document_start(document + 1)
            pieces = range(start, stop, _TOKENS_AT_ONCE)
            tokens = (self._dataset.tokens[at : min(at + _TOKENS_AT_ONCE, stop)] for at in pieces)
            self._decoded[document] = sum(int(self._token_bytes[piece].sum(dtype=np.int64)) for piece in tokens)
        return self._decoded[document]

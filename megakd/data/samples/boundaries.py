"""Starts of documents inside samples, by the dataset's index and by end-of-document ids.

A label is left out of the loss, or of scores, if it is the first token of another document than its input: nothing in
front of it predicts it. The index tells where documents start, whether or not they end with an id.
Axes: ``N`` samples, ``S`` positions.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.protocol import Samples
from megakd.errors import UsageError

INDEX, INDEX_AND_IDS = "index", "index and end-of-document ids"


def begins_document(
    samples: Samples, sample_ids: NDArray[np.int64], rows: NDArray[np.int64], *, eod_token: int | None
) -> NDArray[np.bool_]:
    """Mark the tokens with which a document starts: ``[N, S + 1]`` bool.

    rows: ``[N, S + 1]``, from ``samples.read(sample_ids)``. eod_token: a document starts behind this id too; None: only
    the index counts.
    """
    begins = np.zeros(rows.shape, dtype=np.bool_)
    starts, lengths = samples.starts(sample_ids).tolist(), samples.lengths(sample_ids).tolist()
    for row, start, length in zip(begins, starts, lengths):
        row[starts_between(samples.dataset, start, start + length) - start] = True
    if eod_token is not None:
        begins[:, 1:] |= rows[:, :-1] == eod_token
    return begins


def starts_between(dataset: IndexedDataset, start: int, stop: int) -> NDArray[np.int64]:
    """Token positions in ``[start, stop)`` at which a document of the index starts: ``[n]`` int64, ascending.

    A position is repeated if documents without tokens start there too. Bisection, and not numpy's search, because the
    arrays of an index are not aligned to 8 bytes, and numpy would copy them whole for each search.
    """
    pointers, documents, size = dataset.pointers, dataset.document_indices, dataset.dtype.itemsize
    first = bisect_left(pointers, start * size)
    last = bisect_left(pointers, stop * size, lo=first)
    if first == last:  # no sequence starts there, so no document, which may have several
        return np.zeros(0, dtype=np.int64)
    sequences = documents[bisect_left(documents, first) : bisect_left(documents, last)]
    return np.asarray(pointers[sequences] // size, dtype=np.int64)


def ids_end_documents(dataset: IndexedDataset) -> bool:
    """Return whether an end-of-document id inside a document of the index ends a text.

    False for a dataset of `megakd preprocess`, by its manifest: each document is one text, and an id inside of it was
    a literal in that text. Documents of refined, imported and merged datasets may hold several texts, and datasets of
    Megatron's own tools record nothing: for both, Megatron's rule holds, by which any such id is an end.
    """
    parameters = {} if dataset.manifest is None else dataset.manifest.parameters
    return not ("append_eod" in parameters and "source_tokenizer" not in parameters)


def boundaries_of(dataset: IndexedDataset) -> str:
    """Rule by which ``score --mask-policy reset`` finds the documents of a sample, as scores record it."""
    return INDEX_AND_IDS if ids_end_documents(dataset) else INDEX


def check_boundaries(
    dataset: IndexedDataset, tokenizer: Mapping[str, Any] | None, flag: str, *, instead: str
) -> int | None:
    """Check the index, and return the end-of-document id that ``flag`` looks for besides it.

    tokenizer: the recorded one; None: nothing is recorded. instead: advice for the message if it is missing.
    Returns None for a tokenizer without such an id, and, with a warning, without a tokenizer.

    Raises UsageError if documents may hold several texts and no tokenizer tells what ends one, CorruptError for a
    broken index.
    """
    dataset.check()
    if tokenizer is None and dataset.manifest is not None and ids_end_documents(dataset):
        raise UsageError(
            f"{dataset.prefix}: {flag} needs the end-of-document id: a document of this dataset may hold several "
            f"texts, and neither its manifest nor the checkpoint records a tokenizer; {instead}"
        )
    if tokenizer is None:
        warnings.warn(
            f"{dataset.prefix}: {flag}: no end-of-document id is known: documents start where the index says, and an "
            "id inside one, which would end a text too, is not looked for",
            stacklevel=2,
        )
    eod = (tokenizer or {}).get("eod")
    return None if eod is None else int(eod)

"""Where documents begin inside samples: the index tells, and an end-of-document id where it stands.

A label is left out of the loss, or of scores, where it is the first token of another document than its input: nothing
in front of it tells what it will be. The index has where documents start, whether or not they end with an id.
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
    """``[N, S + 1]``: whether a document starts with each token of ``rows``, or an end-of-document id stands before it.

    rows: ``[N, S + 1]``, as ``samples.read(sample_ids)`` gives them. eod_token: None looks at the index alone.
    """
    found = np.zeros(rows.shape, dtype=np.bool_)
    starts, lengths = samples.starts(sample_ids).tolist(), samples.lengths(sample_ids).tolist()
    for row, start, length in zip(found, starts, lengths):
        row[starts_between(samples.dataset, start, start + length) - start] = True
    if eod_token is not None:
        found[:, 1:] |= rows[:, :-1] == eod_token
    return found


def starts_between(dataset: IndexedDataset, start: int, stop: int) -> NDArray[np.int64]:
    """The token positions from ``start`` to before ``stop`` at which a document of the index starts, ascending; a
    position stands as often as documents without tokens start there too.

    By bisection, and not by numpy's search: the arrays of an index are not aligned to 8 bytes, and numpy would copy
    them whole for each search.
    """
    pointers, documents, size = dataset.pointers, dataset.document_indices, dataset.dtype.itemsize
    first = bisect_left(pointers, start * size)
    last = bisect_left(pointers, stop * size, lo=first)
    if first == last:  # no sequence starts there, so no document, which may have several
        return np.zeros(0, dtype=np.int64)
    sequences = documents[bisect_left(documents, first) : bisect_left(documents, last)]
    return np.asarray(pointers[sequences] // size, dtype=np.int64)


def ids_end_documents(dataset: IndexedDataset) -> bool:
    """Whether an end-of-document id inside a document of the index ends a text.

    False where the manifest tells that each document is one text, which `megakd preprocess` made: an id inside of it
    was a literal in that text. Documents of refined, imported and merged datasets may hold several texts, and what
    Megatron's own tools made records nothing: there Megatron's rule holds, by which any such id is an end.
    """
    parameters = {} if dataset.manifest is None else dataset.manifest.parameters
    return not ("append_eod" in parameters and "source_tokenizer" not in parameters)


def boundaries_of(dataset: IndexedDataset) -> str:
    """What tells the documents that ``score --mask-policy reset`` looks at by themselves, as scores record it."""
    return INDEX_AND_IDS if ids_end_documents(dataset) else INDEX


def check_boundaries(
    dataset: IndexedDataset, tokenizer: Mapping[str, Any] | None, flag: str, *, instead: str
) -> int | None:
    """The end-of-document id that ``flag`` looks for beside the document starts of the index, which are checked.

    tokenizer: what is recorded of it; None: nothing. instead: what to do where it is missing, for the message.
    Returns None for a tokenizer without such an id, and, with a warning, where none is known.

    Raises UsageError where documents may hold several texts and no tokenizer tells what ends one; CorruptError for a
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

"""What each sample is made of: the kinds of the documents that its tokens come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from noise import CLEAN, KINDS
from numpy.typing import NDArray

from megakd.data.indexed.dataset import IndexedDataset


def sample_tokens(kinds: NDArray[np.uint8], lengths: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """``[num_samples, len(KINDS)]``: how many of the tokens that a sample predicts are of each kind.

    kinds: ``[num_documents]``, places in KINDS. lengths: tokens of each document, its end included.
    With concat packing sample *i* predicts the token positions ``i * seq_length + 1`` to ``(i + 1) * seq_length``.
    """
    predicted = np.repeat(kinds, lengths)[1:]
    num_samples = len(predicted) // seq_length
    of_sample = predicted[: num_samples * seq_length].reshape(num_samples, seq_length)
    return np.stack([np.count_nonzero(of_sample == kind, axis=1) for kind in range(len(KINDS))], axis=1)


def sample_kinds(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[num_samples]``, places in KINDS: clean if at least half of the tokens are, else the noise there is most of."""
    clean = KINDS.index(CLEAN)
    noise = np.delete(tokens, clean, axis=1)
    others = np.delete(np.arange(len(KINDS)), clean)
    is_clean = 2 * noise.sum(axis=1) <= tokens.sum(axis=1)
    return np.where(is_clean, clean, others[noise.argmax(axis=1)])


def read_planted(dataset_prefix: Path, kinds_file: Path, seq_length: int) -> NDArray[np.int64]:
    """``sample_tokens`` of a dataset and the kinds of its documents, as ``noise.write_corpus`` wrote them.

    Raises ValueError where the two do not have the same number of documents.
    """
    dataset = IndexedDataset(dataset_prefix)
    kinds = np.array([KINDS.index(kind) for kind in json.loads(kinds_file.read_text())], np.uint8)
    if len(kinds) != dataset.num_documents:
        raise ValueError(f"{dataset_prefix}: {dataset.num_documents} documents, {kinds_file} names {len(kinds)}")
    lengths = [len(dataset.document(document)) for document in range(dataset.num_documents)]
    return sample_tokens(kinds, np.array(lengths, np.int64), seq_length)

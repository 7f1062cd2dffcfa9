"""Packings by name: three ways to cut a dataset into samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.data.samples.documents import DocumentSamples
from megakd.data.samples.protocol import Samples
from megakd.data.samples.sentences import open_sentences
from megakd.data.tokenizer import Tokenizer

Packing = Literal["concat", "sentence", "document"]


def open_samples(
    packing: Packing, dataset: IndexedDataset, seq_length: int, open_tokenizer: Callable[[], Tokenizer]
) -> Samples:
    """Open the samples of a dataset under a packing.

    open_tokenizer: called only if sentence packing is not on disk yet; its sample starts are then written beside the
    dataset.

    Raises UsageError for a dataset without samples, MismatchError for a tokenizer that is not the dataset's.
    """
    if packing == "sentence":
        return open_sentences(dataset, seq_length, open_tokenizer)
    if packing == "document":
        return DocumentSamples(dataset, seq_length)
    return ConcatSamples(dataset, seq_length)

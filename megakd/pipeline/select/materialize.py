"""A refined dataset: the tokens of the kept samples, copied into a ``.bin`` and ``.idx`` of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, say_complete
from megakd.data.indexed.dataset import IndexedWriter
from megakd.data.indexed.finished import find_dataset
from megakd.data.indexed.text_bytes import bytes_of_ranges
from megakd.data.samples.protocol import Samples
from megakd.data.selection import Selection

_COPY_BYTES = 1 << 20  # stays in the cache while it is hashed, checked and written


def materialize(samples: Samples, selection: Selection, prefix: Path) -> Manifest:
    """Write the kept samples as a dataset, one document a sample.

    Neighbours share a token, the last label of one and the first input of the next: where both are kept it is written
    once, as the next one's, so a run of kept samples is the range of tokens that it was. The bytes of a sample's text
    are its part of those of its documents (`bytes_of_ranges`), where the dataset records them.

    Raises MismatchError for another dataset at ``prefix``.
    """
    dataset = samples.dataset
    recorded = None if dataset.manifest is None else dataset.manifest.tokenizer
    parameters = {"refined": {"packing": samples.packing, "seq_length": samples.seq_length}}
    parents = {"dataset": dataset.fingerprint, "selection": selection.fingerprint}
    done = find_dataset(prefix, parameters=parameters, parents=parents, tokenizer=recorded, flag="--materialize")
    if done is not None:
        say_complete(prefix)
        return done
    source = np.asarray(dataset.tokens)  # slices of a memmap are slower
    at_once = max(1, _COPY_BYTES // (dataset.dtype.itemsize * (samples.seq_length + 1)))
    with IndexedWriter(prefix, dataset.dtype) as writer:
        for first in range(0, len(selection), at_once):
            ids = np.asarray(selection.ids[first : first + at_once + 1])  # one more, to see whether it is a neighbour
            starts, lengths = document_ranges(samples, ids, at_once)
            runs = np.flatnonzero(np.concatenate(([True], starts[1:] != starts[:-1] + lengths[:-1])))
            ends = starts[runs] + np.add.reduceat(lengths, runs)
            tokens = [source[start:end] for start, end in zip(starts[runs].tolist(), ends.tolist())]
            sizes = bytes_of_ranges(dataset, starts, starts + lengths) if dataset.has_text_bytes else None
            writer.add_documents(np.concatenate(tokens), lengths.astype(np.int32), sizes)
        return writer.finish(parameters=parameters, parents=parents, tokenizer=recorded)


def document_ranges(
    samples: Samples, ids: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token positions and numbers of tokens of the first ``count`` of ``ids`` as documents."""
    starts = samples.starts(ids)
    ends = starts + samples.lengths(ids)
    next_is_neighbour = ids[1:] == ids[:-1] + 1
    ends[:-1][next_is_neighbour] = np.minimum(ends[:-1], starts[1:])[next_is_neighbour]
    return starts[:count], (ends - starts)[:count]

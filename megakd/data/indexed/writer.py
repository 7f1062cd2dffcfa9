"""Writer of an indexed dataset from token arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter, fsync_directory
from megakd.artefacts.manifest import Manifest, write_manifest
from megakd.data.indexed.idx_format import CODES, bin_path, code_of, idx_path, manifest_path, write_idx_chunks
from megakd.errors import UsageError

FORMAT = "indexed-dataset"
FORMAT_VERSION = 1


class IndexedWriter:
    """Writes ``<prefix>.bin``, ``.idx`` and ``.manifest.json``; nothing has its final name before `finish`.

    It holds four bytes a document in memory. A context manager: leaving it without `finish` removes the files.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any] | type) -> None:
        self.prefix = Path(prefix)
        self.dtype = CODES[code_of(dtype)]
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token_id = -1
        self._lengths = np.empty(1024, dtype=np.int32)
        self._bin = HashingWriter(bin_path(prefix))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``[num_documents]`` int32: tokens per document so far."""
        return self._lengths[: self.num_documents]

    def add_documents(self, tokens: NDArray[np.integer[Any]], lengths: NDArray[np.int32]) -> None:
        """Append documents that lie one after the other in ``tokens``.

        tokens: 1-D, any integer dtype. lengths: ``[num_documents]``, tokens per document; zero is a document too.

        Raises UsageError for an id that the dataset's dtype cannot hold and for lengths that do not add up.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise UsageError(f"tokens of shape {tokens.shape} and dtype {tokens.dtype}: expected one axis of integers")
        if len(lengths) and lengths.min() < 0:
            raise UsageError(f"document length {lengths.min()}: expected at least 0")
        if (total := int(lengths.sum(dtype=np.int64))) != len(tokens):
            raise UsageError(f"the lengths sum to {total}, but there are {len(tokens)} tokens")
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise UsageError(f"a document of {lengths.max()} tokens: the format holds at most 2^31 - 1")
        if len(tokens):
            self.max_token_id = max(self.max_token_id, checked_max(tokens, self.dtype, str(self.prefix)))
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._append_lengths(lengths)
        self.num_tokens += len(tokens)

    def finish(
        self,
        *,
        parameters: Mapping[str, Any] | None = None,
        parents: Mapping[str, str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Make the dataset durable and give it its names, the manifest last.

        ``parameters`` gains the key ``dataset``: dtype, counts and the largest token id.
        """
        with HashingWriter(idx_path(self.prefix)) as idx:
            write_idx_chunks(idx, self.dtype, num_sequences=self.num_documents, lengths=lambda: [self.lengths])
            files = commit_pair(self.prefix, self._bin, idx)
        return write_dataset_manifest(
            self.prefix,
            files,
            dtype=self.dtype,
            num_documents=self.num_documents,
            num_sequences=self.num_documents,
            max_token_id=self.max_token_id,
            parameters=parameters,
            parents=parents,
            tokenizer=tokenizer,
        )

    def abort(self) -> None:
        """Remove the unfinished files; does nothing after `finish`."""
        self._bin.abort()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

    def _append_lengths(self, lengths: NDArray[Any]) -> None:
        stop = self.num_documents + len(lengths)
        if stop > len(self._lengths):
            grown = np.empty(max(stop, 2 * len(self._lengths)), dtype=np.int32)
            grown[: self.num_documents] = self.lengths
            self._lengths = grown
        self._lengths[self.num_documents : stop] = lengths
        self.num_documents = stop


def commit_pair(prefix: str | os.PathLike[str], tokens: HashingWriter, idx: HashingWriter) -> list[FileRecord]:
    """Give ``.bin`` and ``.idx`` their final names.

    An older dataset of this name is removed first, manifest before index, so that at no moment two files that do not
    belong together look like a dataset.
    """
    for old in (manifest_path(prefix), idx_path(prefix)):
        old.unlink(missing_ok=True)
    fsync_directory(idx_path(prefix).parent)
    return [tokens.commit(), idx.commit()]


def write_dataset_manifest(
    prefix: str | os.PathLike[str],
    files: Sequence[FileRecord],
    *,
    dtype: np.dtype[Any],
    num_documents: int,
    num_sequences: int,
    max_token_id: int,
    parameters: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the manifest of a dataset whose ``.bin`` and ``.idx`` are in place. max_token_id: -1 without tokens."""
    dataset = {
        "dtype": dtype.name,
        "num_documents": num_documents,
        "num_sequences": num_sequences,
        "num_tokens": files[0].size_bytes // dtype.itemsize,
        "max_token_id": max_token_id,
    }
    return write_manifest(
        manifest_path(prefix),
        format=FORMAT,
        version=FORMAT_VERSION,
        parameters={**(parameters or {}), "dataset": dataset},
        parents=parents or {},
        tokenizer=tokenizer,
        files=files,
    )


def checked_max(tokens: NDArray[Any], dtype: np.dtype[Any], where: str) -> int:
    """Largest id of ``tokens``. Raises UsageError, which names ``where``, for an id that ``dtype`` cannot hold."""
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest > np.iinfo(dtype).max:
        bad = smallest if smallest < 0 else largest
        raise UsageError(f"{where}: token id {bad}: a dataset of {dtype} holds ids from 0 to {np.iinfo(dtype).max}")
    return largest

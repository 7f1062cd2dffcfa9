"""Writer of an indexed dataset from token arrays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter, fsync_directory
from megakd.artefacts.manifest import Manifest, write_manifest
from megakd.data.indexed.idx_format import (
    CODES,
    bin_path,
    bytes_path,
    code_of,
    idx_path,
    manifest_path,
    write_idx_chunks,
)
from megakd.errors import UsageError

FORMAT = "indexed-dataset"
WITHOUT_BYTES, WITH_BYTES = 1, 2
FORMAT_VERSIONS = (WITHOUT_BYTES, WITH_BYTES)
"""Versions of the format: version 2 is version 1 and ``<prefix>.bytes``."""


class IndexedWriter:
    """Writes ``<prefix>.bin``, ``.idx`` and ``.manifest.json``; nothing has its final name before `finish`.

    Writes ``<prefix>.bytes`` too where the bytes of each document's text are given. Holds four bytes a document in
    memory, twelve with that. A context manager: leaving it without `finish` removes the files.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any] | type) -> None:
        self.prefix = Path(prefix)
        self.dtype = CODES[code_of(dtype)]
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token_id = -1
        self._lengths = np.empty(1024, dtype=np.int32)
        self._text_bytes: NDArray[np.int64] | None = None
        self._bin = HashingWriter(bin_path(prefix))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``[num_documents]`` int32: tokens per document so far."""
        return self._lengths[: self.num_documents]

    def add_documents(
        self,
        tokens: NDArray[np.integer[Any]],
        lengths: NDArray[np.int32],
        text_bytes: NDArray[np.int64] | None = None,
    ) -> None:
        """Append documents that lie one after the other in ``tokens``.

        tokens: 1-D, any integer dtype. lengths: ``[num_documents]``, tokens per document; zero is a document too.
        text_bytes: ``[num_documents]``, UTF-8 bytes of each document's text; for all documents of a dataset, or None.

        Raises UsageError for an id that the dataset's dtype cannot hold, for lengths that do not add up, and for bytes
        below 0 or of some documents alone.
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
        if len(lengths):
            self._append_text_bytes(text_bytes, len(lengths))
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
        num_bytes = None
        with contextlib.ExitStack() as stack:
            idx, sizes = stack.enter_context(HashingWriter(idx_path(self.prefix))), None
            write_idx_chunks(idx, self.dtype, num_sequences=self.num_documents, lengths=lambda: [self.lengths])
            if self._text_bytes is not None:
                of_documents = self._text_bytes[: self.num_documents]
                num_bytes = int(of_documents.sum())
                sizes = stack.enter_context(HashingWriter(bytes_path(self.prefix)))
                sizes.write(of_documents.astype("<i8", copy=False).data)
            files = commit_files(self.prefix, self._bin, idx, sizes)
        return write_dataset_manifest(
            self.prefix,
            files,
            dtype=self.dtype,
            num_documents=self.num_documents,
            num_sequences=self.num_documents,
            max_token_id=self.max_token_id,
            num_bytes=num_bytes,
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

    def _append_text_bytes(self, text_bytes: NDArray[Any] | None, count: int) -> None:
        if self.num_documents and (text_bytes is None) != (self._text_bytes is None):
            raise UsageError(f"{self.prefix}: bytes of text are given of some documents and not of others")
        if text_bytes is None:
            return
        if len(text_bytes) != count or text_bytes.min() < 0:
            least = text_bytes.min(initial=0)
            raise UsageError(f"bytes of {len(text_bytes)} documents, least {least}: expected those of {count}, from 0")
        stop, old = self.num_documents + count, self._text_bytes
        if old is None or stop > len(old):
            grown = np.empty(max(stop, 1024, 2 * self.num_documents), dtype=np.int64)
            grown[: self.num_documents] = [] if old is None else old[: self.num_documents]
            self._text_bytes = grown
        assert self._text_bytes is not None
        self._text_bytes[self.num_documents : stop] = text_bytes


def commit_files(
    prefix: str | os.PathLike[str], tokens: HashingWriter, idx: HashingWriter, text_bytes: HashingWriter | None
) -> list[FileRecord]:
    """Give ``.bin``, ``.idx`` and, unless it is None, ``.bytes`` their final names.

    An older dataset of this name is removed first, manifest before index, so that at no moment files that do not belong
    together look like a dataset.
    """
    for old in (manifest_path(prefix), idx_path(prefix), bytes_path(prefix)):
        old.unlink(missing_ok=True)
    fsync_directory(idx_path(prefix).parent)
    return [file.commit() for file in (tokens, idx, text_bytes) if file is not None]


def write_dataset_manifest(
    prefix: str | os.PathLike[str],
    files: Sequence[FileRecord],
    *,
    dtype: np.dtype[Any],
    num_documents: int,
    num_sequences: int,
    max_token_id: int,
    num_bytes: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the manifest of a dataset whose files are in place.

    files: ``.bin``, ``.idx``, and ``.bytes`` where there is one. max_token_id: -1 without tokens. num_bytes: UTF-8
    bytes of the text of all documents; None without ``.bytes``.
    """
    dataset = {
        "dtype": dtype.name,
        "num_documents": num_documents,
        "num_sequences": num_sequences,
        "num_tokens": files[0].size_bytes // dtype.itemsize,
        "max_token_id": max_token_id,
    }
    if num_bytes is not None:
        dataset["num_bytes"] = num_bytes
    return write_manifest(
        manifest_path(prefix),
        format=FORMAT,
        version=WITHOUT_BYTES if num_bytes is None else WITH_BYTES,
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

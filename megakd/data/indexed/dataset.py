"""The indexed dataset: Megatron's ``.bin/.idx`` opened as one memory-mapped stream of tokens."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest, faults_in_blocks, read_manifest
from megakd.data.indexed.concatenate import TokenFile, concatenate
from megakd.data.indexed.data_path import find_prefix
from megakd.data.indexed.idx_format import (
    best_dtype,
    bin_path,
    bytes_path,
    check_arrays,
    check_ends,
    idx_path,
    manifest_path,
    read_header,
    write_idx,
)
from megakd.data.indexed.writer import FORMAT, FORMAT_VERSIONS, WITH_BYTES, IndexedWriter
from megakd.errors import CorruptError, MismatchError, UsageError

__all__ = ["IndexedDataset", "IndexedWriter", "TokenFile", "best_dtype", "concatenate", "write_idx"]

# Checking every entry of the index reads all of it. A dataset with a manifest was checked when it was written, so a
# long index is not read at open (training by samples never needs it) but when one of its arrays is first used.
_CHECK_AT_OPEN = 1 << 20

NO_TEXT_BYTES = (
    "the dataset does not record the bytes of its text (PREFIX.bytes): `megakd preprocess` does, Megatron's own tools "
    "and older versions did not"
)
"""Reason why figures that divide by bytes are left out, after the name of a dataset."""


class IndexedDataset:
    """A dataset, opened by its data path (see `data_path`). Its arrays are read-only views of the mapped files and stay
    valid after it is gone.

    Raises UsageError where a file is missing, CorruptError where header, index, ``.bin`` and manifest disagree,
    MismatchError if its fingerprint is not ``expect_fingerprint``. Warns where there is no manifest.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, expect_fingerprint: str | None = None) -> None:
        self.prefix = prefix = find_prefix(prefix)
        self._idx_path, tokens_path = idx_path(prefix), bin_path(prefix)
        header = read_header(self._idx_path)
        index = _map(self._idx_path)
        self.dtype = header.dtype
        self.num_documents = header.num_document_indices - 1
        self.num_sequences = header.num_sequences
        self._lengths = np.frombuffer(index, "<i4", header.num_sequences, header.lengths_at)
        self._pointers = np.frombuffer(index, "<i8", header.num_sequences, header.pointers_at)
        self._document_indices = np.frombuffer(index, "<i8", header.num_document_indices, header.document_indices_at)
        self._bin = _map(tokens_path)
        size_bytes = len(self._bin)
        check_ends(self._idx_path, self.dtype, self._lengths, self._pointers, self._document_indices, size_bytes)
        self.num_tokens = size_bytes // self.dtype.itemsize
        self.tokens: NDArray[Any] = np.frombuffer(self._bin, self.dtype)
        """``[num_tokens]`` of ``dtype``: the whole ``.bin``, indexed by token position."""
        self.manifest = self._read_manifest()
        self._checked = False
        if self.manifest is None or self.num_sequences <= _CHECK_AT_OPEN:
            self.check()
        if expect_fingerprint is not None and expect_fingerprint != self.fingerprint:
            raise MismatchError(
                f"{self.prefix}: dataset fingerprint {self.fingerprint}, expected {expect_fingerprint}; "
                "it was rewritten, or this is another dataset"
            )

    @property
    def lengths(self) -> NDArray[np.int32]:
        """``[num_sequences]`` int32: tokens per sequence."""
        self.check()
        return self._lengths

    @property
    def pointers(self) -> NDArray[np.int64]:
        """``[num_sequences]`` int64: byte at which each sequence starts in the ``.bin``."""
        self.check()
        return self._pointers

    @property
    def document_indices(self) -> NDArray[np.int64]:
        """``[num_documents + 1]`` int64: first sequence of each document; the last entry is the number of sequences."""
        self.check()
        return self._document_indices

    @property
    def max_token_id(self) -> int | None:
        """Largest id, as the manifest records it (-1 in a dataset without tokens); None where there is no manifest."""
        return None if self.manifest is None else int(self.manifest.parameters["dataset"]["max_token_id"])

    @property
    def has_text_bytes(self) -> bool:
        """True if the bytes of each document's text are recorded; datasets of Megatron's tools and of older versions of
        megakd have none."""
        return self.manifest is not None and self.manifest.version == WITH_BYTES

    @cached_property
    def text_bytes(self) -> NDArray[np.int64] | None:
        """``[num_documents]`` int64: UTF-8 bytes of the text that each document was tokenized from; None where they are
        not recorded.

        The file is hashed when it is first used: no structure of it would show a flipped byte. Raises CorruptError.
        """
        if not self.has_text_bytes:
            return None
        assert self.manifest is not None
        path = bytes_path(self.prefix)
        if faults := faults_in_blocks(self.manifest, [path.name]):
            raise CorruptError(f"{path.parent}: {'; '.join(faults)}; restore the file or make the dataset again")
        sizes: NDArray[np.int64] = np.frombuffer(_map(path), "<i8")
        total = self.manifest.parameters["dataset"].get("num_bytes")
        if len(sizes) != self.num_documents or sizes.min(initial=0) < 0 or int(sizes.sum()) != total:
            raise CorruptError(
                f"{path}: {len(sizes)} documents of {sizes.sum()} bytes, least {sizes.min(initial=0)}; the manifest "
                f"says {self.num_documents} of {total}"
            )
        return sizes

    def require_text_bytes(self) -> NDArray[np.int64]:
        """Return ``text_bytes``. Raises UsageError where they are not recorded, and CorruptError."""
        sizes = self.text_bytes
        if sizes is None:
            raise UsageError(f"{self.prefix}: {NO_TEXT_BYTES}")
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the manifest; without one, ``unverified:`` with a hash of the index and of the .bin's size."""
        if self.manifest is not None:
            return self.manifest.fingerprint
        hashed = xxhash.xxh3_128(f"{self.dtype.str} {self.num_tokens}".encode())
        for array in (self._lengths, self._document_indices):
            hashed.update(array.data if len(array) else b"")
        return f"unverified:{hashed.hexdigest()}"

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        """The tokens of one sequence, a view."""
        if not -self.num_sequences <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences}")
        start = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[start : start + int(self._lengths[sequence])]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[sequence] for sequence in range(self.num_sequences))

    def document(self, document: int) -> NDArray[Any]:
        """The tokens of one document, a view."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def document_start(self, document: int) -> int:
        """Token position at which a document starts; for ``num_documents``, the one at which the last document ends."""
        sequence = int(self.document_indices[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` int64: token positions at which documents start; of ``num_documents`` that at which the last ends."""
        sequences = self.document_indices[documents]
        positions = np.full(len(documents), self.num_tokens, dtype=np.int64)
        inside = sequences < self.num_sequences
        positions[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        return positions

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to read token positions ``[start, stop)`` ahead; returns at once."""
        if isinstance(self._bin, mmap.mmap):
            first = start * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            self._bin.madvise(mmap.MADV_WILLNEED, first, stop * self.dtype.itemsize - first)

    def check(self) -> None:
        """Check every entry of the index, once; CorruptError for the first bad one."""
        if not self._checked:
            check_arrays(self._idx_path, self.dtype, self._lengths, self._pointers, self._document_indices)
            self._checked = True

    def _read_manifest(self) -> Manifest | None:
        path = manifest_path(self.prefix)
        if not path.exists():
            warnings.warn(
                f"{self.prefix}: no manifest; its structure was checked, its content was not. "
                f"`megakd verify --adopt {self.prefix}` writes one",
                stacklevel=3,
            )
            return None
        manifest = read_manifest(path, format=FORMAT, version=FORMAT_VERSIONS)
        names = [record.name for record in manifest.files]  # the present names, if the dataset was renamed
        expected = [bin_path(self.prefix), idx_path(self.prefix)]
        expected += [bytes_path(self.prefix)] if manifest.version == WITH_BYTES else []
        if names != [file.name for file in expected]:
            listed = ", ".join(file.suffix for file in expected)
            raise CorruptError(f"{path}: names {names}, version {manifest.version} has {listed}")
        recorded = manifest.parameters.get("dataset", {})
        for key, value in (
            ("dtype", self.dtype.name),
            ("num_documents", self.num_documents),
            ("num_sequences", self.num_sequences),
            ("num_tokens", self.num_tokens),
        ):
            if recorded.get(key) != value:
                raise CorruptError(f"{path}: {key} {recorded.get(key)}, but the index says {value}")
        return manifest


def _map(path: Path) -> mmap.mmap | bytes:
    """Map a file read-only. Arrays over it keep the mapping alive; Python refuses to close it under them."""
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:  # an empty file cannot be mapped
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

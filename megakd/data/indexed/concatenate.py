"""Joining datasets, or token files, into one dataset in bounded memory."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter, OnBytes
from megakd.artefacts.manifest import Manifest, faults_in_blocks, read_manifest
from megakd.data.indexed.idx_format import (
    bin_path,
    bytes_path,
    idx_path,
    manifest_path,
    read_header,
    write_idx_chunks,
)
from megakd.data.indexed.writer import (
    FORMAT,
    FORMAT_VERSIONS,
    WITH_BYTES,
    checked_max,
    commit_files,
    write_dataset_manifest,
)
from megakd.errors import CorruptError, MismatchError, UsageError

_COPY_BYTES = 4 * 2**20
_INDEX_CHUNK = 1 << 18


@dataclass(frozen=True)
class TokenFile:
    """Documents without a dataset's index: their raw tokens, and their lengths as a one-axis int32 ``.npy``.

    bytes_path: one-axis int64 ``.npy`` of the bytes of each document's text; None where they are not known.
    """

    bin_path: Path
    lengths_path: Path
    bytes_path: Path | None = None


def write_lengths(path: Path, lengths: NDArray[np.int32]) -> FileRecord:
    """Write the ``lengths_path`` of a token file. lengths: ``[num_documents]``, tokens in each. Raises NoSpaceError."""
    return _write_npy(path, np.ascontiguousarray(lengths, dtype="<i4"))


def write_text_bytes(path: Path, text_bytes: NDArray[np.int64]) -> FileRecord:
    """Write the ``bytes_path`` of a token file. text_bytes: ``[num_documents]``. Raises NoSpaceError."""
    return _write_npy(path, np.ascontiguousarray(text_bytes, dtype="<i8"))


def _write_npy(path: Path, array: NDArray[Any]) -> FileRecord:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    with HashingWriter(path) as out:
        out.write(header.getbuffer())
        out.write(array.data)
        return out.commit()


def concatenate(
    sources: Sequence[TokenFile | tuple[Path, Path] | Path | str],
    out_prefix: str | os.PathLike[str],
    *,
    dtype: np.dtype[Any] | type | None = None,
    parameters: Mapping[str, Any] | None = None,
    parents: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    progress: OnBytes | None = None,
) -> Manifest:
    """Join token files, or whole datasets by prefix, into one dataset in the order given.

    Reads and writes a few megabytes at a time, so memory depends neither on the size nor on the number of documents.

    dtype: dtype of the tokens in token files; needed where no prefix tells it. progress: called with token bytes
    copied. The result records the bytes of its documents' texts if every source does.

    Raises MismatchError for sources of different dtypes and for ids beyond the tokenizer, CorruptError for lengths that
    do not sum to the tokens and for damaged bytes of texts; a dataset that was at ``out_prefix`` is then still there.
    """
    opened = [_open_source(source, None if dtype is None else np.dtype(dtype)) for source in sources]
    dtypes = {source.dtype for source in opened} or ({np.dtype(dtype)} if dtype is not None else set())
    if len(dtypes) != 1:
        listing = ", ".join(f"{source.bin}: {source.dtype}" for source in opened)
        raise MismatchError(f"{out_prefix}: sources of one dtype expected, found {listing or 'no source'}")
    token_dtype = dtypes.pop()
    num_sequences = sum(source.num_sequences for source in opened)
    num_documents = sum(source.num_documents for source in opened)
    max_token_id, num_bytes = -1, None

    def lengths() -> Iterator[NDArray[Any]]:
        for source in opened:
            yield from source.lengths()

    def document_indices() -> Iterator[NDArray[Any]]:
        yield np.zeros(1, dtype=np.int64)
        base = 0
        for source in opened:
            for piece in source.document_ends():
                yield piece + base
            base += source.num_sequences

    with contextlib.ExitStack() as stack:
        tokens_out = stack.enter_context(HashingWriter(bin_path(out_prefix)))
        idx, sizes = stack.enter_context(HashingWriter(idx_path(out_prefix))), None
        for source in opened:
            max_token_id = max(max_token_id, _copy_tokens(source, tokens_out, progress))
        vocab_size = (tokenizer or {}).get("vocab_size")
        if vocab_size is not None and max_token_id >= vocab_size:
            raise MismatchError(f"{out_prefix}: token id {max_token_id}, the tokenizer has {vocab_size} entries")
        write_idx_chunks(
            idx,
            token_dtype,
            num_sequences=num_sequences,
            lengths=lengths,
            document_indices=document_indices,
            num_document_indices=num_documents + 1,
        )
        if opened and all(source.text_bytes is not None for source in opened):
            sizes, num_bytes = stack.enter_context(HashingWriter(bytes_path(out_prefix))), 0
            for piece in (piece for source in opened for piece in source.sizes()):
                num_bytes += int(piece.sum())
                sizes.write(piece.data)
        files = commit_files(out_prefix, tokens_out, idx, sizes)
    return write_dataset_manifest(
        out_prefix,
        files,
        dtype=token_dtype,
        num_documents=num_documents,
        num_sequences=num_sequences,
        max_token_id=max_token_id,
        num_bytes=num_bytes,
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class _Source:
    """One input of `concatenate`, read piece by piece rather than mapped: mapped pages count as resident memory."""

    bin: Path
    index: Path
    dtype: np.dtype[Any]
    num_sequences: int
    num_documents: int
    lengths_at: int
    document_indices_at: int | None
    text_bytes: tuple[Path, int] | None
    """File of the bytes of each document's text, and where they start in it."""

    def lengths(self) -> Iterator[NDArray[np.int32]]:
        return _read_pieces(self.index, np.dtype("<i4"), self.lengths_at, self.num_sequences)

    def sizes(self) -> Iterator[NDArray[np.int64]]:
        assert self.text_bytes is not None
        path, at = self.text_bytes
        return _read_pieces(path, np.dtype("<i8"), at, self.num_documents)

    def document_ends(self) -> Iterator[NDArray[np.int64]]:
        if self.document_indices_at is not None:
            yield from _read_pieces(self.index, np.dtype("<i8"), self.document_indices_at + 8, self.num_documents)
        else:
            for start in range(0, self.num_documents, _INDEX_CHUNK):
                yield np.arange(start + 1, min(start + _INDEX_CHUNK, self.num_documents) + 1, dtype=np.int64)


def _open_source(source: TokenFile | tuple[Path, Path] | Path | str, dtype: np.dtype[Any] | None) -> _Source:
    if isinstance(source, (str, Path)):
        header = read_header(idx_path(source))
        opened = _Source(
            bin_path(source),
            idx_path(source),
            header.dtype,
            header.num_sequences,
            header.num_document_indices - 1,
            header.lengths_at,
            header.document_indices_at,
            _checked_bytes(source),
        )
    else:
        tokens = source if isinstance(source, TokenFile) else TokenFile(*source)
        if dtype is None:
            raise UsageError(f"{tokens.bin_path}: a token file does not record its dtype; pass dtype=")
        with open(tokens.lengths_path, "rb") as stream:
            count = _npy_count(stream, tokens.lengths_path, np.dtype("<i4"))
            at = stream.tell()
        sizes = None if tokens.bytes_path is None else (tokens.bytes_path, _bytes_at(tokens.bytes_path, count))
        opened = _Source(tokens.bin_path, tokens.lengths_path, dtype, count, count, at, None, sizes)
    total, least = 0, 0
    for piece in opened.lengths():
        total, least = total + int(piece.sum(dtype=np.int64)), min(least, int(piece.min()))
    size_bytes = opened.bin.stat().st_size
    if least < 0 or total * opened.dtype.itemsize != size_bytes:
        raise CorruptError(
            f"{opened.bin}: {size_bytes} bytes, but {opened.index} counts {total} tokens of {opened.dtype} "
            f"(shortest document {least})"
        )
    return opened


def _checked_bytes(prefix: Path | str) -> tuple[Path, int] | None:
    """File of the bytes of a dataset's texts, and 0; None where they are not recorded. Raises CorruptError."""
    if not manifest_path(prefix).is_file():
        return None
    manifest = read_manifest(manifest_path(prefix), format=FORMAT, version=FORMAT_VERSIONS)
    if manifest.version != WITH_BYTES:
        return None
    if faults := faults_in_blocks(manifest, [bytes_path(prefix).name]):
        raise CorruptError(f"{bytes_path(prefix).parent}: {'; '.join(faults)}")
    return bytes_path(prefix), 0


def _bytes_at(path: Path, num_documents: int) -> int:
    """Byte at which the bytes of texts start in a file of `write_text_bytes`. Raises CorruptError."""
    with open(path, "rb") as stream:
        count = _npy_count(stream, path, np.dtype("<i8"))
        if count != num_documents:
            raise CorruptError(f"{path}: bytes of {count} documents, expected those of {num_documents}")
        return stream.tell()


def _npy_count(stream: BinaryIO, path: Path, expected: np.dtype[Any]) -> int:
    """Length of the array of one axis and a dtype in a .npy file; leaves the stream at its first entry."""
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("format version is not 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise CorruptError(f"{path}: not a .npy file of numbers: {error}") from error
    at, size_bytes = stream.tell(), os.fstat(stream.fileno()).st_size
    if len(shape) != 1 or dtype != expected or at + dtype.itemsize * shape[0] != size_bytes:
        raise CorruptError(f"{path}: shape {shape}, dtype {dtype}, {size_bytes} bytes: expected one axis of {expected}")
    return int(shape[0])


def _read_pieces(path: Path, dtype: np.dtype[Any], at: int, count: int) -> Iterator[NDArray[Any]]:
    with open(path, "rb") as stream:
        stream.seek(at)
        for start in range(0, count, _INDEX_CHUNK):
            want = min(_INDEX_CHUNK, count - start)
            piece = np.fromfile(stream, dtype=dtype, count=want)
            if len(piece) != want:
                raise CorruptError(f"{path}: ends at entry {start + len(piece)} of {count}; cut while it was read")
            yield piece


def _copy_tokens(source: _Source, out: HashingWriter, progress: OnBytes | None) -> int:
    """Append a source's tokens to ``out``; returns the largest id, -1 for none. progress: called with bytes copied."""
    max_token_id, left = -1, source.bin.stat().st_size
    buffer = bytearray(min(_COPY_BYTES, max(left, 1)))
    with open(source.bin, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            left -= count
            # Only the end of a regular file makes a short read, so a piece holds whole tokens.
            tokens = np.frombuffer(buffer, dtype=source.dtype, count=count // source.dtype.itemsize)
            max_token_id = max(max_token_id, checked_max(tokens, source.dtype, str(source.bin)))
            out.write(memoryview(buffer)[:count])
            if progress is not None:
                progress(count)
    if left:
        raise CorruptError(f"{source.bin}: its size changed while it was read ({left} bytes short)")
    return max_token_id

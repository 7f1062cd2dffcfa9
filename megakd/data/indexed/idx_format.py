"""Bytes of Megatron's ``.idx``: header, dtype codes, structural checks, and a writer in bounded memory.

Layout (little-endian, no padding), as megatron-core 0.16.1 reads it::

    "MMIDIDX\\0\\0"  u64 version = 1  u8 dtype code  u64 num_sequences N  u64 num_document_indices D
    i32[N] lengths in tokens    i64[N] pointers in bytes into the .bin    i64[D] document_indices

Document ``d`` is the sequences ``document_indices[d] : document_indices[d + 1]``; the first entry is 0, the last N.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter
from megakd.errors import CorruptError, UsageError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_FLOAT_CODES = (6, 7)
# Checks and writes walk the arrays in pieces that stay in the cache.
_CHUNK = 1 << 16

Lengths = NDArray[np.int32]
Pointers = NDArray[np.int64]
ChunkSource = Callable[[], Iterable[NDArray[Any]]]
"""Callable that starts a pass over an array too long to hold: yields it piece by piece."""


@dataclass(frozen=True)
class IdxHeader:
    """The header, the first 34 bytes; the byte positions of the three arrays follow from it."""

    dtype: np.dtype[Any]
    num_sequences: int
    num_document_indices: int

    @property
    def lengths_at(self) -> int:
        return HEADER.size

    @property
    def pointers_at(self) -> int:
        return self.lengths_at + 4 * self.num_sequences

    @property
    def document_indices_at(self) -> int:
        return self.pointers_at + 8 * self.num_sequences

    @property
    def size_bytes(self) -> int:
        return self.document_indices_at + 8 * self.num_document_indices


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Dtype that Megatron's tools choose: uint16 below 65,500 entries, else int32."""
    return CODES[8] if vocab_size < 65500 else CODES[4]


def code_of(dtype: np.dtype[Any] | type) -> int:
    """Code of a token dtype in the header. Raises UsageError where the format has none."""
    for code, known in CODES.items():
        if known == np.dtype(dtype):
            return code
    raise UsageError(f"token dtype {np.dtype(dtype)}: expected one of {', '.join(str(d) for d in CODES.values())}")


def read_header(path: str | os.PathLike[str]) -> IdxHeader:
    """Read the header, and compare its counts with the file's size before anything is allocated by them.

    Raises CorruptError for a damaged file, UsageError for an index of another kind.
    """
    with open(path, "rb") as stream:
        raw = stream.read(HEADER.size)
        size_bytes = os.fstat(stream.fileno()).st_size
    if len(raw) < HEADER.size:
        raise CorruptError(f"{path}: {len(raw)} bytes, the header alone has {HEADER.size}")
    magic, version, code, num_sequences, num_document_indices = HEADER.unpack(raw)
    if magic != MAGIC:
        raise CorruptError(f"{path}: starts with {magic!r}, a Megatron index with {MAGIC!r}")
    if version != VERSION:
        raise CorruptError(f"{path}: index version {version}, expected {VERSION}")
    if code in _FLOAT_CODES:
        raise UsageError(f"{path}: dtype code {code} holds floating-point numbers; token ids are integers")
    if code not in CODES:
        raise CorruptError(f"{path}: dtype code {code}, expected one of {sorted(CODES)}")
    header = IdxHeader(CODES[code], num_sequences, num_document_indices)
    if num_document_indices < 1:
        raise CorruptError(f"{path}: no document indices; even an empty dataset has the entry 0")
    if size_bytes == header.size_bytes + num_sequences and num_sequences:
        raise UsageError(f"{path}: a multimodal index (one mode byte per sequence); only text datasets are supported")
    if size_bytes != header.size_bytes:
        raise CorruptError(
            f"{path}: {size_bytes} bytes, but {num_sequences} sequences and {num_document_indices} document indices "
            f"make {header.size_bytes}"
        )
    return header


def check_ends(path: str | os.PathLike[str], dtype: np.dtype[Any], lengths: Lengths, pointers: Pointers,
               document_indices: Pointers, bin_size_bytes: int) -> None:  # fmt: skip
    """Check a few entries only: where the first and the last sequence and document lie. Raises CorruptError."""
    num_sequences = len(lengths)
    if num_sequences:
        last = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
        if int(pointers[0]) != 0:
            raise _not_contiguous(path, 0, int(pointers[0]), 0)
    else:
        last = 0
    if last != bin_size_bytes:
        raise CorruptError(
            f"{path}: the last sequence ends at byte {last} of a .bin of {bin_size_bytes} bytes; "
            "the two files do not belong together, or one was cut"
        )
    if int(document_indices[0]) != 0 or int(document_indices[-1]) != num_sequences:
        raise CorruptError(
            f"{path}: document indices run from {document_indices[0]} to {document_indices[-1]}, "
            f"expected 0 to {num_sequences}, the number of sequences"
        )


def check_arrays(path: str | os.PathLike[str], dtype: np.dtype[Any], lengths: Lengths, pointers: Pointers,
                 document_indices: Pointers) -> None:  # fmt: skip
    """Check every entry: lengths are not negative, sequences contiguous, document indices ascending.

    Raises CorruptError.
    """
    position = 0
    for start in range(0, len(lengths), _CHUNK):
        piece = lengths[start : start + _CHUNK]
        if piece.min() < 0:
            worst = int(np.argmax(piece < 0))
            raise CorruptError(f"{path}: sequence {start + worst} has length {piece[worst]}")
        ends = np.cumsum(piece, dtype=np.int64)
        expected = (position + ends - piece) * dtype.itemsize
        recorded = pointers[start : start + _CHUNK]
        if not np.array_equal(expected, recorded):
            worst = int(np.argmax(expected != recorded))
            raise _not_contiguous(path, start + worst, int(recorded[worst]), int(expected[worst]))
        position += int(ends[-1])
    for start in range(0, len(document_indices) - 1, _CHUNK):
        index = document_indices[start : start + _CHUNK + 1]
        if (index[1:] < index[:-1]).any():
            worst = start + int(np.argmax(index[1:] < index[:-1]))
            raise CorruptError(f"{path}: document {worst} ends before it starts")


def write_idx(
    path: str | os.PathLike[str],
    dtype: np.dtype[Any] | type,
    lengths: Lengths,
    document_indices: Pointers | None = None,
) -> FileRecord:
    """Write an ``.idx`` whose sequences follow one another in the ``.bin``.

    lengths: ``[num_sequences]`` int32, tokens per sequence.
    document_indices: ``[num_documents + 1]``; None for one sequence a document.
    """
    with HashingWriter(path) as writer:
        write_idx_chunks(
            writer,
            dtype,
            num_sequences=len(lengths),
            lengths=lambda: [lengths],
            document_indices=None if document_indices is None else lambda: [document_indices],
            num_document_indices=None if document_indices is None else len(document_indices),
        )
        return writer.commit()


def write_idx_chunks(
    writer: HashingWriter,
    dtype: np.dtype[Any] | type,
    *,
    num_sequences: int,
    lengths: ChunkSource,
    document_indices: ChunkSource | None = None,
    num_document_indices: int | None = None,
) -> None:
    """Write an ``.idx`` from arrays that come piece by piece, see `write_idx`; ``lengths`` is passed over twice."""
    num_document_indices = num_sequences + 1 if num_document_indices is None else num_document_indices
    writer.write(HEADER.pack(MAGIC, VERSION, code_of(dtype), num_sequences, num_document_indices))
    for part in _pieces(lengths):
        writer.write(np.ascontiguousarray(part, dtype="<i4").data)
    # One buffer for all pieces: fresh pages for each would cost several times the arithmetic.
    itemsize, buffer = np.dtype(dtype).itemsize, np.zeros(_CHUNK + 1, dtype="<i8")
    for part in _pieces(lengths):
        ends = buffer[1 : len(part) + 1]
        np.multiply(part, itemsize, out=ends, dtype=np.int64)
        ends[0] += buffer[0]
        np.cumsum(ends, out=ends)
        writer.write(buffer[: len(part)].data)
        buffer[0] = ends[-1]
    if document_indices is not None:
        for part in _pieces(document_indices):
            writer.write(np.ascontiguousarray(part, dtype="<i8").data)
        return
    buffer = np.arange(_CHUNK, dtype="<i8")
    for start in range(0, num_document_indices, _CHUNK):
        writer.write(buffer[: num_document_indices - start].data)
        buffer += _CHUNK


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the index, ``<prefix>.idx``."""
    return Path(f"{os.fspath(prefix)}.idx")


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the tokens, ``<prefix>.bin``."""
    return Path(f"{os.fspath(prefix)}.bin")


def bytes_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the bytes of text of each document, ``<prefix>.bytes``; not every dataset has them."""
    return Path(f"{os.fspath(prefix)}.bytes")


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the manifest, ``<prefix>.manifest.json``."""
    return Path(f"{os.fspath(prefix)}.manifest.json")


def _pieces(source: ChunkSource) -> Iterator[NDArray[Any]]:
    for array in source():
        for start in range(0, len(array), _CHUNK):
            yield array[start : start + _CHUNK]


def _not_contiguous(path: str | os.PathLike[str], sequence: int, found: int, expected: int) -> CorruptError:
    return CorruptError(
        f"{path}: sequence {sequence} starts at byte {found}, the one before it ends at {expected}; sequences must "
        "follow one another in the .bin (megatron-core's builder writes them so), because samples are ranges of it"
    )

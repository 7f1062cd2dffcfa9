"""Reading JSON lines: plain, gzip or zstandard, line by line in bounded memory, and the reasons a record is refused."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import orjson

from megakd.errors import CorruptError, UsageError

Kind = Literal["plain", "gzip", "zstd"]

_READ_BYTES = 1 << 20
_ZSTD_READ_BYTES = 4096  # what they decompress to comes in one piece: 130 MB at the very worst
_SKIP_REPORT_BYTES = 256 << 20
_BOM = b"\xef\xbb\xbf"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SUFFIXES: dict[str, Kind] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_OTHER_FORMATS = {
    b"BZh": "bzip2: decompress it, or recompress it with zstd",
    b"\xfd7zXZ\x00": "xz: decompress it, or recompress it with zstd",
    b"PAR1": "Parquet: export it as JSON lines",
    b"PK\x03\x04": "a zip archive: unpack it",
}
# More than text ever gains (gzip reaches 1,029, zstandard 32,700): a file made to fill the disk, not a corpus.
_MAX_COMPRESSION, _COMPRESSION_FROM_BYTES = 500, 64 << 20


@dataclass(frozen=True)
class BadRecord:
    """A line that gives no document."""

    line: int
    """1 for the first line of the file, blank ones counted."""
    byte_offset: int
    """Where the line starts, in the decompressed file."""
    reason: str
    """One of a few, to count by."""
    detail: str


class RecordError(ValueError):
    """Why a line gives no document."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def kind_of(path: Path) -> Kind:
    """How a file is compressed, by its first bytes.

    Raises UsageError for what is no UTF-8 JSON lines file at all, CorruptError for a suffix that the content belies.
    """
    with open(path, "rb") as stream:
        head = stream.read(8)
    kind: Kind = "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else "plain"
    named = _SUFFIXES.get(path.suffix)
    if named is not None and named != kind:
        raise CorruptError(f"{path}: named {path.suffix}, but starts with {head!r}; it was cut or is misnamed")
    if kind == "plain":
        _refuse_other_formats(path, head)
    return kind


class Lines:
    """The lines of a file that start at or after a byte, and how far reading has come.

    start: in the decompressed file. A plain file is read from there, a compressed one from its beginning.
    max_line_bytes: a longer line is skipped and comes as None.
    on_skip: called now and then on the way to ``start``, which may take long in a compressed file.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        *,
        start: int = 0,
        max_line_bytes: int,
        on_skip: Callable[[], object] = lambda: None,
    ) -> None:
        self.path = path
        self.num_bytes_read = 0
        """Of the file as it lies on disk, from its beginning or the start asked for."""
        self._kind = kind
        self._start = start
        self._max = max_line_bytes
        self._on_skip = on_skip

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Pairs of byte offset and line, its line end included."""
        with open(self.path, "rb", buffering=0) as file:
            try:
                yield from self._read(file)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _corrupt(self.path, str(error)) from error

    def _read(self, file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
        offset = 0
        if self._kind == "plain" and self._start > 0:
            # The byte before tells whether a line starts exactly here.
            offset = self._start - 1
            file.seek(offset)
        base = offset
        stream = _open_stream(file, self.path, self._kind)
        if offset:
            offset += _skip_line(stream)
        first = True
        readline, limit = stream.readline, self._max + 1
        while line := readline(limit):
            start, size = offset, len(line)
            if first and start == 0:
                if self._kind != "plain":
                    _refuse_other_formats(self.path, line[:8])
                line = line.removeprefix(_BOM)
            first = False
            kept: bytes | None = line
            if size == limit and line[-1:] != b"\n":
                kept = None
                size += _skip_line(stream)
            offset += size
            self.num_bytes_read = offset - base if self._kind == "plain" else file.tell()
            if start >= self._start:
                yield start, kept
            elif start // _SKIP_REPORT_BYTES != offset // _SKIP_REPORT_BYTES:
                self._on_skip()


def parse_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The text under each key of one JSON record. Raises RecordError."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _explain(line, error) from None
    if type(record) is not dict:
        raise RecordError("not an object", f"the record is {_name(record)}, expected an object")
    texts = []
    for key in keys:
        text = record.get(key)
        if type(text) is not str:
            if key not in record:
                raise RecordError("missing key", f"no key {key!r} among {sorted(record)[:8]}")
            raise RecordError("not text", f"{key!r} is {_name(text)}, expected a string")
        texts.append(text)
    return texts


def count_duplicate_keys(line: bytes, keys: Sequence[str], quoted: Sequence[bytes]) -> int:
    """How many of the keys stand more than once in the record, whose last one counts. quoted: the keys as JSON."""
    if all(line.count(name) < 2 for name in quoted):
        return 0
    pairs: list[tuple[str, Any]] = []

    def keep_last(found: list[tuple[str, Any]]) -> None:
        pairs[:] = found  # objects end from the inside out: the record itself comes last

    json.loads(line, object_pairs_hook=keep_last)
    names = [name for name, _ in pairs]
    return sum(names.count(key) > 1 for key in keys)


def _explain(line: bytes, error: orjson.JSONDecodeError) -> RecordError:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return RecordError("invalid UTF-8", f"{wrong.reason} at byte {wrong.start} of the line")
    if not line.endswith(b"\n"):
        return RecordError("cut last line", f"the file ends inside a record: {error}")
    if "surrogate" in str(error):
        return RecordError("lone surrogate", str(error))
    return RecordError("malformed JSON", str(error))


def _name(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}[type(value)]


def _refuse_other_formats(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:4]:
        raise UsageError(f"{path}: looks like UTF-16 or UTF-32; expected UTF-8: iconv -f UTF-16 -t UTF-8 {path}")
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise UsageError(f"{path}: this is {what}")


def _open_stream(file: IO[bytes], path: Path, kind: Kind) -> IO[bytes]:
    if kind == "plain":
        return io.BufferedReader(file, _READ_BYTES)  # type: ignore[type-var]
    if kind == "gzip":
        source: io.RawIOBase = _Bounded(gzip.GzipFile(fileobj=file), file, path)
    else:
        source = _Bounded(_ZstdFrames(file, path), file, path)
    return io.BufferedReader(source, _READ_BYTES)


class _Bounded(io.RawIOBase):
    """A decompressed stream that refuses to grow out of all proportion to its file."""

    def __init__(self, source: Any, file: IO[bytes], path: Path) -> None:
        self._source, self._file, self._path = source, file, path
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._source.readinto(buffer))
        self._num_bytes += count
        if self._num_bytes > _COMPRESSION_FROM_BYTES and self._num_bytes > _MAX_COMPRESSION * self._file.tell():
            raise CorruptError(f"{self._path}: more than {_MAX_COMPRESSION} bytes from each byte; no corpus does that")
        return count


class _ZstdFrames:
    """Every frame of a zstandard file. zstandard's own reader takes a cut last frame for the end of the file."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        import zstandard

        self._file, self._path = file, path
        self._error = zstandard.ZstdError
        self._context = zstandard.ZstdDecompressor()
        self._frame = self._context.decompressobj()
        self._fresh = True  # no byte of the present frame was read
        self._ready = memoryview(b"")

    def readinto(self, buffer: memoryview) -> int:
        """Bytes put into the buffer, 0 at the end of the file. Raises CorruptError."""
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else self._file.read(_ZSTD_READ_BYTES)
            if self._frame.eof:
                self._frame = self._context.decompressobj()
                self._fresh = True
                data = data or self._file.read(_ZSTD_READ_BYTES)
            if not data:
                if self._fresh:
                    return 0
                raise _corrupt(self._path, "the last zstandard frame has no end")
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise _corrupt(self._path, str(error)) from error
            self._fresh = False
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _corrupt(path: Path, why: str) -> CorruptError:
    return CorruptError(f"{path}: cut or damaged: {why}; fetch it again, or test it with gzip -t or zstd -t")


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; the number of bytes read."""
    count = 0
    while piece := stream.readline(_READ_BYTES):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count

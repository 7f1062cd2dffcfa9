"""Decompressed streams of text files: plain, every member of a gzip file, every frame of a zstandard file."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from pathlib import Path
from typing import IO, Any, Literal

from megakd.errors import CorruptError, UsageError

Kind = Literal["plain", "gzip", "zstd"]

READ_BYTES = 1 << 20
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
LARGEST_WINDOW_BYTES = 1 << 31
"""Window of ``zstd --long=31``, the largest that zstandard decompresses; allocated only where a frame needs it."""
_ZSTD_READ_BYTES = 4096  # they decompress to one piece: 130 MB at the very worst
_ZSTD_HEADER_BYTES = 18
# No text compresses that well (gzip can reach 1,029, zstandard 32,700): such a file is made to fill the disk.
_MAX_COMPRESSION, _COMPRESSION_FROM_BYTES = 500, 64 << 20


def most_bytes(size_bytes: int) -> int:
    """Largest decompressed size of a compressed file of ``size_bytes`` that is not refused."""
    return max(_COMPRESSION_FROM_BYTES, _MAX_COMPRESSION * size_bytes)


def open_stream(file: IO[bytes], path: Path, kind: Kind, *, buffer_bytes: int = READ_BYTES) -> IO[bytes]:
    """Open a buffered reader of the decompressed content of ``file``.

    file: unbuffered, at its beginning; a plain one at any place.

    Reading raises CorruptError for a file that is cut or damaged, UsageError for a zstandard frame that needs a
    dictionary, or more memory than there is.
    """
    if kind == "plain":
        return io.BufferedReader(file, buffer_bytes)  # type: ignore[type-var]
    source = gzip.GzipFile(fileobj=file) if kind == "gzip" else _ZstdFrames(file, path)
    return io.BufferedReader(_Bounded(source, file, path), buffer_bytes)


def after_skippable_frames(file: IO[bytes]) -> bytes:
    """Read the first 8 bytes behind the skippable frames at the beginning of ``file``; b"" where nothing follows.

    RFC 8878, section 3.1.2: four bytes 184D2A50 to 5F, the size in four, and as many bytes of anything. zstandard and
    lz4 both have them; pzstd begins its files with one.
    """
    end = 0
    while is_skippable(head := _read_at(file, end)):
        end += 8 + int.from_bytes(head[4:8], "little")
    return head


def is_skippable(head: bytes) -> bool:
    """Return whether ``head`` begins a skippable frame."""
    return len(head) >= 4 and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50


def _read_at(file: IO[bytes], offset: int) -> bytes:
    file.seek(offset)
    return file.read(8)


class _Bounded(io.RawIOBase):
    """A decompressed stream that raises CorruptError once it is far larger than any text compresses to."""

    def __init__(self, source: Any, file: IO[bytes], path: Path) -> None:
        self._source, self._file, self._path = source, file, path
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = int(self._source.readinto(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _corrupt(self._path, str(error)) from error
        self._num_bytes += count
        if self._num_bytes > most_bytes(self._file.tell()):
            raise CorruptError(f"{self._path}: more than {_MAX_COMPRESSION} bytes from each byte; no corpus does that")
        return count


class _ZstdFrames:
    """Reader of every frame of a zstandard file, as zstandard's own takes a cut last frame for the file's end."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        import zstandard

        self._file, self._path = file, path
        self._error, self._read_header = zstandard.ZstdError, zstandard.get_frame_parameters
        self._context = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        self._frame: Any = None
        self._window = 0
        self._held = b""  # read from the file, and part of the next frame
        self._ready = memoryview(b"")

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; returns the number of bytes, 0 at the end of the file. Raises CorruptError, UsageError."""
        while not self._ready:
            if self._frame is None and not self._begin_frame():
                return 0
            data, self._held = self._held or self._file.read(_ZSTD_READ_BYTES), b""
            if not data:
                raise _corrupt(self._path, "the last zstandard frame has no end")
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except (self._error, MemoryError) as error:
                if isinstance(error, MemoryError) or "not enough memory" in str(error):
                    raise _no_memory(self._path, self._window) from error
                raise _corrupt(self._path, str(error)) from error
            if self._frame.eof:
                self._held = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _begin_frame(self) -> bool:
        """Prepare the next frame that is not skippable; returns False at the end of the file."""
        while is_skippable(self._hold()):
            end = self._file.tell() - len(self._held) + 8 + int.from_bytes(self._held[4:8], "little")
            if len(self._held) < 8 or end > os.fstat(self._file.fileno()).st_size:
                raise _corrupt(self._path, "the last zstandard frame, a skippable one, has no end")
            self._file.seek(end)
            self._held = b""
        if not self._held:
            return False
        try:
            header = self._read_header(self._held)
        except self._error as error:
            raise _corrupt(self._path, str(error)) from error
        if header.dict_id:
            raise UsageError(
                f"{self._path}: compressed with zstandard dictionary {header.dict_id}, which a reader needs too; "
                f"recompress it without: zstd -dc -D DICTIONARY {self._path} | zstd -o NEW.zst"
            )
        self._window = header.window_size
        if self._window > LARGEST_WINDOW_BYTES:
            raise UsageError(
                f"{self._path}: a zstandard frame that needs a window of {_mebibytes(self._window)}; at most "
                f"{_mebibytes(LARGEST_WINDOW_BYTES)} can be read (zstd --long=31); recompress it"
            )
        self._frame = self._context.decompressobj()
        return True

    def _hold(self) -> bytes:
        """Held bytes, read on to the size of the longest frame header, or to the end of the file."""
        if len(self._held) < _ZSTD_HEADER_BYTES:
            self._held += self._file.read(_ZSTD_READ_BYTES - len(self._held))
        return self._held


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"


def _no_memory(path: Path, window_bytes: int) -> UsageError:
    return UsageError(
        f"{path}: decompressing it takes a window of {_mebibytes(window_bytes)} in each worker that reads such a file, "
        f"and that memory is refused; give fewer --workers, or recompress it: "
        f"zstd -dc --long=31 {path} | zstd -o NEW.zst"
    )


def _corrupt(path: Path, why: str) -> CorruptError:
    return CorruptError(f"{path}: cut or damaged: {why}; fetch it again, or test it with gzip -t or zstd -t")

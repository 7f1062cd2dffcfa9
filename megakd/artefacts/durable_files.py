"""Files that are whole or absent: hashed while they are written, fsynced, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from megakd.artefacts.file_lock import NoLocksError, lock_stream, open_to_lock
from megakd.errors import NoSpaceError, UsageError

BLOCK_BYTES = 64 * 2**20
_READ_BYTES = 4 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

OnBytes = Callable[[int], object]
"""Callback that takes the number of bytes just processed."""


@dataclass(frozen=True)
class FileRecord:
    """One file of an artefact: ``name`` relative to the manifest's folder, size, and hashes in hexadecimal."""

    name: str
    size_bytes: int
    xxh3_128: str
    blocks: tuple[str, ...]
    """XXH3-128 of each 64 MiB block, the last one shorter; empty for an empty file."""


def hash_file(path: str | os.PathLike[str], *, progress: OnBytes | None = None) -> FileRecord:
    """Hash a file; returns its record under its base name. progress: called after each piece."""
    hashes = _Hashes()
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hashes.update(buffer[:count])
            if progress is not None:
                progress(count)
    return hashes.record(Path(path).name)


def hash_block(path: str | os.PathLike[str], block: int) -> str:
    """XXH3-128 of one 64 MiB block of a file, in hexadecimal; the last block is shorter."""
    hashes, left = xxhash.xxh3_128(), BLOCK_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as stream:
        stream.seek(block * BLOCK_BYTES)
        while left and (count := stream.readinto(buffer[: min(left, _READ_BYTES)])):
            hashes.update(buffer[:count])
            left -= count
    return hashes.hexdigest()


class HashingWriter:
    """A binary file that is hashed while it is written, under a temporary name until `commit`.

    A context manager: leaving it without a commit, or by an exception, removes the file. The temporary name is
    ``<final>.tmp``. The file is locked, so that a second process with the same output is refused; a file that a killed
    run left is overwritten.

    Raises UsageError where another process is writing the same file, NoSpaceError where the disk is full.
    """

    def __init__(self, final: str | os.PathLike[str]) -> None:
        self.final = Path(final)
        self.temporary = self.final.with_name(self.final.name + ".tmp")
        self._hashes = _Hashes()
        with explain_no_space(self.temporary):
            make_parent(self.temporary)
            self._stream: BinaryIO | None = _open_locked(self.temporary)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._hashes.size_bytes

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``: any contiguous buffer, a numpy array's ``.data`` included."""
        if self._stream is None:
            raise ValueError(f"{self.temporary}: write after the end")
        view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        self._hashes.update(view)
        with explain_no_space(self.temporary, needed_bytes=len(view)):
            while len(view):
                view = view[self._stream.write(view) :]

    def commit(self) -> FileRecord:
        """Make the file durable under its final name."""
        if self._stream is None:
            raise ValueError(f"{self.temporary}: commit after the end")
        with explain_no_space(self.temporary):
            os.fsync(self._stream.fileno())
            # Renamed while it is open: closing gives up the lock, and another writer could take over the name.
            os.replace(self.temporary, self.final)
            self._close()
        fsync_directory(self.final.parent)
        return self._hashes.record(self.final.name)

    def abort(self) -> None:
        """Remove the file; does nothing after `commit`."""
        if self._stream is not None:
            self.temporary.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> HashingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new content and nothing else.

    The temporary file of a killed writer is overwritten by the next one. The caller's lock must keep two writers of one
    file apart.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explain_no_space(path, needed_bytes=len(data)):
            temporary.write_bytes(data)
            commit_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def commit_file(temporary: str | os.PathLike[str], final: str | os.PathLike[str]) -> None:
    """Make a finished file durable and give it its final name in the same folder."""
    with explain_no_space(temporary):
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, final)
    fsync_directory(Path(final).parent)


def make_parent(path: str | os.PathLike[str]) -> None:
    """Make the folder of an output where it is missing. Raises UsageError where a file is in its place."""
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(
            f"{path}: {folder} is not a folder, a file is in its place; give the output another"
        ) from error


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable: a crash may undo renames and removals before this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_no_space(path: str | os.PathLike[str], *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn a full disk, a quota or a file-size limit inside the block into a NoSpaceError that names ``path``."""
    try:
        yield
    except OSError as error:
        if isinstance(error, NoSpaceError) or error.errno not in FULL:
            raise
        try:
            free = f"{shutil.disk_usage(Path(path).parent).free} bytes are free"
        except OSError:
            free = "its free space is unknown"
        needed = "" if needed_bytes is None else f" while writing {needed_bytes} more bytes"
        raise NoSpaceError(
            error.errno,
            f"{os.strerror(error.errno or 0)}{needed} ({free}); free some space or raise the limit, then run again",
            os.fspath(path),
        ) from error


class _Hashes:
    """XXH3-128 of a stream, whole and in blocks."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_128()
        self._blocks: list[str] = []

    def update(self, view: memoryview) -> None:
        while len(view):
            part = view[: BLOCK_BYTES - self.size_bytes % BLOCK_BYTES]
            self._whole.update(part)
            self._block.update(part)
            self.size_bytes += len(part)
            if self.size_bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._block.hexdigest())
                self._block.reset()
            view = view[len(part) :]

    def record(self, name: str) -> FileRecord:
        last = [self._block.hexdigest()] if self.size_bytes % BLOCK_BYTES else []
        return FileRecord(name, self.size_bytes, self._whole.hexdigest(), (*self._blocks, *last))


def _open_locked(path: Path) -> BinaryIO:
    """Open an empty file for writing, locked; on a file system without locks nothing keeps a second writer out."""
    stream = open_to_lock(path)
    try:
        with contextlib.suppress(NoLocksError):
            lock_stream(stream, path)
        stream.truncate(0)
    except BlockingIOError as error:
        stream.close()
        raise UsageError(f"{path}: another process is writing this output; wait for it or end it") from error
    except FileNotFoundError as error:
        stream.close()
        raise UsageError(f"{path}: another process has just finished this output; run again to replace it") from error
    except BaseException:
        stream.close()
        raise
    return stream

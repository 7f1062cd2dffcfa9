"""A checkpoint in megatron-core's ``torch_dist`` form, written by one process, a piece of a tensor at a time.

megatron-core's own writer holds a whole rank's model in memory. This one holds a piece, and hashes what it writes. No
process group is needed, and nothing of megatron.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megakd.artefacts.durable_files import HashingWriter, atomic_write, fsync_directory
from megakd.artefacts.manifest import FileRecord, hash_file, write_manifest
from megakd.errors import NoSpaceError
from megakd.model.checkpoint.foreign import BACKENDS, COMMON, METADATA
from megakd.model.checkpoint.record import FORMAT, MANIFEST, TRACKER, VERSION, checkpoint_path
from megakd.work.progress import ByteProgress

_SHARD = "__0_0.distcp"
_PORTION_BYTES = 1 << 19
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """A part of a tensor of a checkpoint.

    name, size: of the whole, layers and experts stacked. offset, lengths: of the part, in the axes of the whole. fill:
    fills the part, in place.
    """

    name: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    lengths: tuple[int, ...]
    fill: Callable[[Tensor], None]

    @property
    def num_items(self) -> int:
        """Numbers in the part."""
        return math.prod(self.lengths)


def write_checkpoint(
    folder: Path,
    pieces: Sequence[Piece],
    *,
    iteration: int,
    dtype: torch.dtype,
    parameters: dict[str, Any],
    parents: dict[str, str],
    tokenizer: dict[str, Any] | None,
    what: str,
) -> Path:
    """Write ``iter_...`` of ``pieces`` in ``folder``, move the tracker to it and return it; whole or not at all.

    pieces: cover each of their tensors once. dtype: of all. what: name of the work, for progress.

    Raises:
        NoSpaceError: the disk cannot hold it; nothing is written then.
    """
    final = checkpoint_path(folder, iteration)
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = sum(piece.num_items for piece in pieces) * dtype.itemsize
    free = shutil.disk_usage(partial).free
    if total > free:
        raise NoSpaceError(f"{folder}: the checkpoint needs {total / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
    with ByteProgress(total, what=what) as progress:
        shard, metadata = _write_pieces(partial, pieces, dtype, progress)
    files = [shard, *_write_small_files(partial, metadata)]
    write_manifest(
        partial / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**parameters, "iteration": iteration, "torch": torch.__version__},
        parents=parents,
        tokenizer=tokenizer,
        files=sorted(files, key=lambda record: record.name),
    )
    os.rename(partial, final)
    fsync_directory(folder)
    atomic_write(folder / TRACKER, f"{iteration}\n".encode())
    return final


def _write_pieces(
    folder: Path, pieces: Sequence[Piece], dtype: torch.dtype, progress: ByteProgress
) -> tuple[FileRecord, Metadata]:
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, Any] = {}
    properties = TensorProperties(dtype=dtype)
    buffer = bytearray(max(piece.num_items for piece in pieces) * dtype.itemsize)
    with HashingWriter(folder / _SHARD) as writer:
        for piece in pieces:
            start = writer.num_bytes
            part = torch.frombuffer(buffer, dtype=dtype, count=piece.num_items).view(piece.lengths)
            piece.fill(part)
            torch.save(part, cast("IO[bytes]", _Stream(writer)))
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.lengths))
            stored = tensors.setdefault(piece.name, TensorStorageMetadata(properties, torch.Size(piece.size), []))
            index = MetadataIndex(piece.name, chunk.offsets, len(stored.chunks))
            places[index] = _StorageInfo(_SHARD, start, writer.num_bytes - start)
            stored.chunks.append(chunk)
            progress.update(part.nbytes)
        record = writer.commit()
    return record, Metadata(state_dict_metadata=dict(tensors), storage_data=places)


class _Stream:
    """A hashing writer as the stream that ``torch.save`` expects; it flushes at the end alone.

    Bytes are passed on in portions that stay in the processor's cache while they are hashed and copied.
    """

    def __init__(self, writer: HashingWriter) -> None:
        self._writer = writer

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PORTION_BYTES):
            self._writer.write(view[start : start + _PORTION_BYTES])

    def flush(self) -> None:
        """Do nothing: `HashingWriter.commit` makes the whole file durable."""


def _write_small_files(folder: Path, metadata: Metadata) -> list[FileRecord]:
    common = io.BytesIO()
    torch.save({}, common)  # megatron-core's readers expect it
    contents = {
        METADATA: pickle.dumps(metadata),
        COMMON: common.getvalue(),
        BACKENDS: json.dumps(_BACKENDS).encode(),
    }
    for name, content in contents.items():
        atomic_write(folder / name, content)
    return [hash_file(folder / name) for name in contents]

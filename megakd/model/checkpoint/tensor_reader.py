"""Weights of a ``torch_dist`` checkpoint, read a layer's matrix at a time: no process group, no megatron, one process.

Whatever layout wrote the checkpoint, a weight is put together from the chunks that its ``.metadata`` lists.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from megakd.artefacts.durable_files import BLOCK_BYTES
from megakd.artefacts.manifest import fault_in_block
from megakd.errors import CorruptError
from megakd.model.checkpoint.damage import damaged
from megakd.model.checkpoint.foreign import KeyForm
from megakd.model.checkpoint.plain_pickle import BROKEN_PICKLE
from megakd.model.checkpoint.record import CheckpointRecord
from megakd.model.checkpoint.tensor_names import read_metadata


class TensorReader:
    """Reader of the weights of the checkpoint ``record``, under this project's names (layers are stacked).

    Blocks of the files are compared with the manifest's hashes before anything of them is used. Holds no tensor; a
    chunk of the checkpoint is in memory while it is copied.

    Raises CorruptError where the list of tensors is damaged or names what no checkpoint needs.
    """

    def __init__(self, record: CheckpointRecord) -> None:
        self.record = record
        metadata = read_metadata(record.path)
        self._files = {file.name: file for file in record.manifest.files} if record.manifest and record.checked else {}
        self._hashed: set[tuple[str, int]] = set()
        self._stored = _stored_tensors(metadata, record.path)
        form = KeyForm.of(self._stored)
        self._keys: dict[str, dict[int | None, str]] = {}
        for key in self._stored:
            if key.startswith(form.prefix):
                plain = key.removeprefix(form.prefix)
                layer = plain.split(".")[2] if form.layers_apart and plain.startswith("decoder.layers.") else ""
                number = int(layer) if layer.isdecimal() else None
                self._keys.setdefault(form.plain(key), {})[number] = key

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors, without layer numbers; those of the optimizer's state are among them."""
        return frozenset(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; the first axis of a layer's weights is the number of the layer."""
        keys = self._keys[name]
        shapes = {self._stored[key].shape for key in keys.values()}
        if len(shapes) != 1:
            raise CorruptError(f"{self.record.path}: {name} has different shapes in its layers: {sorted(shapes)}")
        if None in keys:
            return shapes.pop()
        if sorted(keys, key=lambda number: number or 0) != list(range(len(keys))):
            raise CorruptError(f"{self.record.path}: {name} is there for layers {sorted(map(str, keys))} alone")
        return (len(keys), *shapes.pop())

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor's numbers."""
        return self._stored[next(iter(self._keys[name].values()))].dtype

    def read(self, name: str, *index: int) -> Tensor:
        """Return a tensor, or its part at ``index`` of the first axes, as ``tensor[index]`` does; on the CPU.

        Raises:
            CorruptError: the files differ from their hashes, or are no tensors of torch's.
        """
        keys = self._keys[name]
        stored = self._stored[keys[None]] if None in keys else self._stored[keys[index[0]]]
        rest = index if None in keys else index[1:]
        out = torch.empty(stored.shape[len(rest) :], dtype=stored.dtype)
        for chunk in stored.chunks:
            inside = all(offset <= i < offset + size for i, offset, size in zip(rest, chunk.offsets, chunk.sizes))
            if inside:
                self._copy(stored, chunk, rest, out)
        return out

    def _copy(self, stored: _Stored, chunk: _Chunk, index: tuple[int, ...], out: Tensor) -> None:
        part = self._load(stored, chunk)
        for i, offset in zip(index, chunk.offsets):
            part = part[i - offset]
        for axis, (offset, size) in enumerate(zip(chunk.offsets[len(index) :], chunk.sizes[len(index) :])):
            out = out.narrow(axis, offset, size)
        out.copy_(part)

    def _load(self, stored: _Stored, chunk: _Chunk) -> Tensor:
        """Return the whole of one chunk, held against the hashes and its size."""
        self._check_blocks(chunk)
        path = self.record.path / chunk.file
        try:
            with open(path, "rb") as stream:
                part = torch.load(
                    cast("IO[bytes]", _Part(stream, chunk.start, chunk.length)), map_location="cpu", weights_only=True
                )
        except BROKEN_PICKLE as error:
            raise CorruptError(f"{self.record.role}: {path} cannot be read: {_first_line(error)}") from None
        if not isinstance(part, Tensor) or tuple(part.shape) != chunk.sizes or part.dtype != stored.dtype:
            raise CorruptError(
                f"{self.record.role}: {path} holds something else at byte {chunk.start} than {stored.key} "
                f"{list(chunk.sizes)} of {stored.dtype}, which .metadata lists there"
            )
        return part

    def _check_blocks(self, chunk: _Chunk) -> None:
        if not self._files:
            return
        file = self._files.get(chunk.file)
        if file is None:
            raise CorruptError(f"{self.record.path}: .metadata lists {chunk.file}, which the manifest does not name")
        last = max(chunk.start, chunk.start + chunk.length - 1) // BLOCK_BYTES
        for block in range(chunk.start // BLOCK_BYTES, min(last, len(file.blocks) - 1) + 1):
            if (chunk.file, block) in self._hashed:
                continue
            fault = fault_in_block(self.record.path / chunk.file, file, block)
            if fault is not None:
                raise damaged(self.record.path, [fault], role=self.record.role, flag=self.record.flag, hash_all=True)
            self._hashed.add((chunk.file, block))


@dataclass(frozen=True)
class _Chunk:
    """Box of a tensor, ``offsets`` to ``offsets + sizes``, and its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class _Stored:
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


def _stored_tensors(metadata: Metadata, path: Path) -> dict[str, _Stored]:
    """Return the tensors of a checkpoint by their keys, except the optimizer's.

    Raises:
        CorruptError: chunks do not make up a tensor, lie nowhere, or outside the folder.
    """
    places = {(place.fqn, tuple(place.offset or ())): info for place, info in (metadata.storage_data or {}).items()}
    sizes_on_disk = {name: os.path.getsize(path / name) for name in os.listdir(path) if (path / name).is_file()}
    stored = {}
    for key, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or "optimizer." in key:
            continue
        shape, chunks = tuple(tensor.size), []
        for chunk in tensor.chunks:
            info = places.get((key, tuple(chunk.offsets)))
            if info is None or info.relative_path not in sizes_on_disk:
                raise CorruptError(f"{path}: {key} {_box(chunk)} is listed in .metadata, and its file is not there")
            if info.offset < 0 or info.offset + info.length > sizes_on_disk[info.relative_path]:
                raise CorruptError(
                    f"{path / info.relative_path}: {sizes_on_disk[info.relative_path]} bytes, {key} ends at byte "
                    f"{info.offset + info.length}: the file was cut; restore it from a copy"
                )
            if getattr(info, "transform_descriptors", None):
                raise CorruptError(f"{path}: {key} is stored transformed ({info.transform_descriptors}), not plain")
            chunks.append(
                _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
            )
        if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape) or any(
            offset < 0 or offset + size > length
            for chunk in chunks
            for offset, size, length in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        ):
            raise CorruptError(f"{path}: the {len(chunks)} chunks of {key} do not make up a tensor {list(shape)}")
        stored[key] = _Stored(key, shape, tensor.properties.dtype, tuple(chunks))
    return stored


def _box(chunk: ChunkStorageMetadata) -> str:
    return f"at {list(chunk.offsets)}, {list(chunk.sizes)},"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


class _Part(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a file, as a file of their own: nothing is read ahead of its use."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return cast(int, count)

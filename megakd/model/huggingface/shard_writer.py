"""Safetensors files, written tensor by tensor: which tensor goes into which file, the index, and the bytes.

A file is an 8-byte little-endian length, a JSON header of that many bytes (name -> dtype, shape, begin and end of the
bytes) and the tensors one after the other: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megakd.artefacts.durable_files import FileRecord, HashingWriter, OnBytes

INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_SHARD_BYTES = 5_000_000_000  # as transformers cut folders for years
_ALIGNMENT = 8  # of the first tensor's bytes in the file
_METADATA = {"format": "pt"}  # transformers refuses a file that does not say so
_PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TensorSpec:
    """Tensor that a file is to hold: its name there, numbers and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """File of a folder, with the tensors that it holds in the order of their bytes."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def header(self) -> bytes:
        """Length and JSON header: all bytes of the file before its first tensor."""
        entries: dict[str, object] = {"__metadata__": _METADATA}
        begin = 0
        for tensor in self.tensors:
            end = begin + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: Iterable[TensorSpec], max_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most ``max_bytes`` of tensors, in their order; a larger one has its own file.

    One file is ``model.safetensors``; several are ``model-00001-of-00003.safetensors`` and so on.
    """
    groups: list[list[TensorSpec]] = []
    size = 0
    for tensor in tensors:
        if not groups or size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    # wider numbers first, so that every tensor is aligned to its own numbers
    return [
        Shard(name, tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)))
        for name, group in zip(names, groups)
    ]


def index_of(shards: Sequence[Shard]) -> bytes | None:
    """Return the content of `INDEX`, which tells the file of each tensor; None for a single file, which needs none."""
    if len(shards) == 1:
        return None
    tensors = [(tensor, shard.file) for shard in shards for tensor in shard.tensors]
    content = {
        "metadata": {
            "total_parameters": sum(prod(tensor.shape) for tensor, _ in tensors),
            "total_size": sum(tensor.num_bytes for tensor, _ in tensors),
        },
        "weight_map": {tensor.name: file for tensor, file in sorted(tensors, key=lambda pair: pair[0].name)},
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def write_shard(
    folder: Path, shard: Shard, read: Callable[[TensorSpec], Tensor], *, progress: OnBytes | None = None
) -> FileRecord:
    """Write one file, durable, and return its record; one tensor is in memory at a time.

    read: makes a tensor of its specification. progress: called after each piece with its number of bytes.
    """
    with HashingWriter(folder / shard.file) as writer:
        writer.write(shard.header)
        for spec in shard.tensors:
            tensor = read(spec)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
            content = memoryview(bytes_of(tensor))
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                writer.write(piece)
                if progress is not None:
                    progress(len(piece))
        return writer.commit()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, row by row, without a copy if it lies so already."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

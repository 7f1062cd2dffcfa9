"""Export: a Hugging Face folder of a checkpoint, written tensor by tensor, read again and compared, then named.

One process and no process group, whatever layout wrote the checkpoint; in memory is one matrix of a layer, or the
embedding. The folder appears under its name when all of it is durable and equal to the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.artefacts.durable_files import FileRecord, HashingWriter, atomic_write, fsync_directory, make_parent
from megakd.artefacts.manifest import Manifest, hash_file, read_manifest, write_manifest
from megakd.artefacts.run_lock import RunLock
from megakd.errors import CorruptError, MismatchError, NoSpaceError
from megakd.model.checkpoint.tensor_reader import TensorReader
from megakd.model.config import ModelShape
from megakd.model.huggingface.config_json import CONFIG
from megakd.model.huggingface.config_writer import check_shape, stacked_name, weight_names
from megakd.model.huggingface.export_plan import ExportPlan, check_config
from megakd.model.huggingface.exported import FORMAT, MANIFEST, VERSION, find_export, parameters_of
from megakd.model.huggingface.families.table import HfTensor
from megakd.model.huggingface.folder import GENERATION_CONFIG, open_folder
from megakd.model.huggingface.layout import to_theirs
from megakd.model.huggingface.load import Slice, fill_slices_inplace
from megakd.model.huggingface.shard_writer import (
    DTYPE_NAMES,
    INDEX,
    Shard,
    TensorSpec,
    index_of,
    plan_shards,
    write_shard,
)
from megakd.work.progress import ByteProgress

_PARTIAL, _MARK = ".partial", ".of.json"
_FUSED_NORM, _TE_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"
_SMALL_BYTES = 64 * 2**20  # room for the files beside the tensors


def export(plan: ExportPlan, folder: Path, *, max_shard_bytes: int) -> Manifest:
    """Write the folder that ``plan`` describes and return its manifest; an export that is there already is kept.

    A killed export is continued: files that it finished are not written again, only compared.

    Raises:
        UsageError: something else is at ``folder``, or another export writes there. MismatchError: an export of another
        checkpoint is there, or the checkpoint's tensors are not those of its shape. CorruptError: the checkpoint is
        damaged, or what was written is read back as something else. NoSpaceError.
    """
    wanted = parameters_of(plan, max_shard_bytes)
    if (finished := find_export(folder, plan, wanted)) is not None:
        return finished
    source = _Source(plan)
    specs = source.specs()
    shards = plan_shards(specs, max_shard_bytes)
    dtype = str(specs[0].dtype).removeprefix("torch.")
    config = plan.config(dtype)
    check_config(config, plan.record.shape, f"{plan.record.role} {plan.record.path}")
    partial = folder.with_name(folder.name + _PARTIAL)
    make_parent(partial / _MARK)
    with RunLock(folder.with_name(folder.name + ".lock")):
        _continue_or_clear(partial, {"checkpoint": plan.record.fingerprint, **wanted})
        total = sum(spec.num_bytes for spec in specs)
        _check_space(partial, shards)
        with ByteProgress(total, what=f"writing {folder}") as progress:
            files = [_shard(partial, shard, source, progress) for shard in shards]
        index = index_of(shards)
        small = {
            CONFIG: _json(config),
            GENERATION_CONFIG: _json(plan.generation_config(config)),
            **({} if index is None else {INDEX: index}),
            **plan.tokenizer.written,
        }
        files += [_write(partial / name, content) for name, content in small.items()]
        files += [_copy(path, partial / name) for name, path in plan.tokenizer.copied.items()]
        with ByteProgress(total, what=f"comparing {folder} with {plan.record.path}") as progress:
            _compare(partial, source, progress)
        return _commit(partial, folder, plan, wanted, files)


class _Source:
    """Tensors of the checkpoint under their names in the folder, made one at a time."""

    def __init__(self, plan: ExportPlan) -> None:
        self.plan, self.shape = plan, plan.record.shape
        self.reader = TensorReader(plan.record)
        self._names = _names_in(self.reader, self.shape, plan)
        self._last: tuple[_Place, Tensor] | None = None
        self.tensors = {tensor.theirs: tensor for tensor in plan.tensors()}
        self.parts: dict[_Place, list[HfTensor]] = {}
        """The tensors of the folder that make up each part of the checkpoint."""
        for tensor in plan.family.tensors(self.shape, plan.rows):
            self.parts.setdefault(self._place(tensor), []).append(tensor)

    def specs(self) -> list[TensorSpec]:
        """Return name, type and shape of every tensor of the folder. Raises MismatchError for a shape that differs."""
        wrong = set()
        for place, parts in self.parts.items():
            stacks: tuple[int, ...] = (self.shape.num_layers,) if place.layer is not None else ()
            stacks += (self.shape.num_experts or 0,) if place.expert is not None else ()
            needed = (*stacks, sum(part.size[0] for part in parts), *parts[0].size[1:])
            stored = self.reader.shape(place.name)
            padded = parts[0].place == "vocabulary" and stored[0] >= needed[0] and stored[1:] == needed[1:]
            if stored != needed and not padded:
                wrong.add(f"{place.name} is {list(stored)}, expected {list(needed)}")
        if wrong:
            raise MismatchError(
                f"{self.plan.record.path}: not the tensors of its model: {'; '.join(sorted(wrong)[:5])} "
                f"({len(wrong)} in all)"
            )
        return [TensorSpec(name, self.dtype(tensor), tensor.size) for name, tensor in self.tensors.items()]

    def read(self, spec: TensorSpec) -> Tensor:
        """Return one tensor of the folder. Raises MismatchError for numbers that its type cannot hold."""
        tensor = self.tensors[spec.name]
        part = to_theirs(self.part(self._place(tensor)), tensor.place, tensor.size[0], self.shape)
        cast = part.to(spec.dtype)
        if spec.dtype == torch.float16 and bool((cast.isinf() & ~part.isinf()).any()):
            raise MismatchError(
                f"{self.plan.record.path}: {spec.name} has a number of {float(part.abs().max()):g}, more than float16 "
                "can hold: --dtype bfloat16"
            )
        if self.plan.exact and cast.dtype != part.dtype and not _same_bytes(cast.to(part.dtype), part):
            raise MismatchError(
                f"{self.plan.record.path}: {spec.name} loses digits as {self.plan.dtype}, the type of the folder that "
                "the model came from: --dtype float32 keeps them, --dtype float16 says that it may"
            )
        return cast

    def part(self, place: _Place) -> Tensor:
        """Return a part of the checkpoint, ``[R, C]`` or ``[R]``; the last one is kept for the next tensors."""
        if self._last is None or self._last[0] != place:
            index = [number for number in (place.layer, place.expert) if number is not None]
            self._last = None  # or two would be in memory
            self._last = place, self.reader.read(place.name, *index)
        return self._last[1]

    def _place(self, tensor: HfTensor) -> _Place:
        name, layer = stacked_name(tensor.ours)
        return _Place(self._names[name], layer, tensor.expert)

    def dtype(self, tensor: HfTensor) -> torch.dtype:
        """Return the type that a tensor of the folder has."""
        wanted: torch.dtype | None = None if self.plan.dtype is None else getattr(torch, self.plan.dtype)
        return self.reader.dtype(self._place(tensor).name) if wanted is None else wanted


@dataclass(frozen=True)
class _Place:
    """Tensor of the checkpoint, or its part of one layer, or of one expert."""

    name: str
    layer: int | None
    expert: int | None


def _names_in(reader: TensorReader, shape: ModelShape, plan: ExportPlan) -> dict[str, str]:
    """Return the names that the weights have in the checkpoint, by their names in this project's own.

    Raises:
        MismatchError: lists the weights that are missing, and those that a folder would not hold.
    """
    names = {name: name for name in weight_names(shape)}
    if _TE_NORM in reader.names:  # Transformer Engine's layers of experts have the norm apart
        names[_FUSED_NORM] = _TE_NORM
    missing, more = sorted(set(names.values()) - reader.names), sorted(reader.names - set(names.values()))
    if missing or more:
        lists = [f"lacks {', '.join(missing[:5])} ({len(missing)} in all)"] * bool(missing)
        lists += [f"has {', '.join(more[:5])} ({len(more)} in all), which {plan.family.model_type} has not"] * bool(
            more
        )
        raise MismatchError(f"{plan.record.path} {'; '.join(lists)}")
    return names


def _shard(partial: Path, shard: Shard, source: _Source, progress: ByteProgress) -> FileRecord:
    """Write a file, or keep the one that a killed export finished."""
    path, header = partial / shard.file, shard.header
    if path.is_file() and path.stat().st_size == shard.num_bytes:
        with open(path, "rb") as stream:
            if stream.read(len(header)) == header:
                return hash_file(path, progress=progress.update)
    return write_shard(partial, shard, source.read, progress=progress.update)


def _compare(partial: Path, source: _Source, progress: ByteProgress) -> None:
    """Open the folder as an import does, fill every part of the checkpoint from it, and compare the bytes.

    Raises:
        CorruptError: names the tensors that differ; the files are removed, or the next try would keep them.
    """

    def filled() -> Iterator[Slice]:
        """Yield a slice to fill, and compare it when the next one is asked for."""
        for place, parts in source.parts.items():
            names = [part.theirs for part in parts]
            ours, dtype = source.part(place), source.dtype(parts[0])
            back = torch.empty(sum(part.size[0] for part in parts), *ours.shape[1:], dtype=dtype)
            yield Slice(parts[0].ours, place.expert, (0,) * back.dim(), back)
            types = {folder.stored[name].dtype for name in names}
            if types != {DTYPE_NAMES[dtype]} or not _same_bytes(back, ours[: len(back)].to(dtype)):
                raise CorruptError(
                    f"{partial}: {', '.join(names)} read back is not {place.name} of {source.plan.record.path}: a "
                    "fault of the disk, or of megakd; the files were removed, run again"
                )
            progress.update(back.nbytes)

    try:
        folder = open_folder(partial, "the export")
        check_shape(source.shape, folder.shape, "the export")
        fill_slices_inplace(filled(), folder)
    except CorruptError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    numbers = {4: torch.int32, 2: torch.int16}[left.element_size()]
    return torch.equal(left.contiguous().view(numbers), right.contiguous().view(numbers))


def _continue_or_clear(partial: Path, mark: dict[str, Any]) -> None:
    """Keep the files of a killed export of the same checkpoint; remove those of any other."""
    path, content = partial / _MARK, _json(mark)
    if not path.is_file() or path.read_bytes() != content:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        atomic_write(path, content)


def _check_space(partial: Path, shards: list[Shard]) -> None:
    """Refuse to begin an export that the disk cannot hold. Raises NoSpaceError with the bytes needed and free."""
    written = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    needed, free = sum(shard.num_bytes for shard in shards) + _SMALL_BYTES - written, shutil.disk_usage(partial).free
    if needed > free:
        raise NoSpaceError(
            f"{partial}: the export needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; free some space and run "
            "again"
        )


def _commit(
    partial: Path, folder: Path, plan: ExportPlan, parameters: dict[str, Any], files: list[FileRecord]
) -> Manifest:
    known = {record.name for record in files}
    for path in partial.iterdir():
        if path.name not in known:  # the mark, and what an older try left
            path.unlink()
    write_manifest(
        partial / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters=parameters,
        parents={"checkpoint": plan.record.fingerprint},
        tokenizer=None if plan.tokenizer.record is None else dict(plan.tokenizer.record),
        files=sorted(files, key=lambda record: record.name),
    )
    os.rename(partial, folder)  # an empty folder of that name gives way
    fsync_directory(folder.parent)
    return read_manifest(folder / MANIFEST)


def _write(path: Path, content: bytes) -> FileRecord:
    with HashingWriter(path) as writer:
        writer.write(content)
        return writer.commit()


def _copy(source: Path, path: Path) -> FileRecord:
    return _write(path, source.read_bytes())


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"

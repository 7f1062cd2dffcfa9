"""Loading a Hugging Face folder into a model: tensor by tensor, each rank the rows and columns that it holds.

Files are mapped a block of rows at a time, so that resident memory stays far below that of the largest file.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.model.huggingface.families.table import HfTensor
from megakd.model.huggingface.folder import HfFolder
from megakd.model.huggingface.layout import Run, runs, within
from megakd.model.huggingface.safetensors_files import ITEM_BYTES, StoredTensor

_BLOCK_BYTES = 1 << 26  # mapped at a time
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# names of megatron's Transformer Engine layers with experts -> those that a checkpoint has
_OTHER_NAMES = {
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
}


@dataclass(frozen=True)
class Slice:
    """A part of one of our tensors that a rank holds.

    name: with the layer's number. expert: its index, None without experts. start: first row and, of a matrix, first
    column in the whole. data: the part itself.
    """

    name: str
    expert: int | None
    start: tuple[int, ...]
    data: Tensor


def fill_slices_inplace(slices: Iterable[Slice], folder: HfFolder) -> None:
    """Fill every slice from ``folder``, in place, and rows of padding with 0."""
    sources = sources_of(folder)
    with torch.no_grad():
        for part in slices:
            name = part.name
            for ending, checkpoint_ending in _OTHER_NAMES.items():
                if name.endswith(ending):
                    name = name.removesuffix(ending) + checkpoint_ending
            _fill_inplace(part, sources[name, part.expert], folder)


def sources_of(folder: HfFolder) -> dict[tuple[str, int | None], list[HfTensor]]:
    """Return the folder's tensors that make up each of ours, by name and expert."""
    sources: dict[tuple[str, int | None], list[HfTensor]] = defaultdict(list)
    for tensor in folder.expected:
        sources[tensor.ours, tensor.expert].append(tensor)
    return dict(sources)


def blocks_of(tensor: HfTensor, stored: StoredTensor, shape: ModelShape, start: int, stop: int) -> Iterator[Run]:
    """Yield the rows of one of their tensors that lie in the rows ``start`` to ``stop`` of ours, a block at a time."""
    row_bytes = math.prod(stored.shape[1:]) * ITEM_BYTES[stored.dtype]
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for run in within(runs(tensor.place, tensor.size[0], shape), start, stop):
        for done in range(0, run.rows, rows):
            yield Run(run.theirs + done, run.ours + done, min(rows, run.rows - done))


def copy_rows_inplace(target: Tensor, stored: StoredTensor, first: int, columns: slice) -> None:
    """Copy rows of a stored tensor, from ``first`` on, into ``target``, in place; its type may be another one.

    columns: of a matrix, those that the target has.
    """
    row_items = math.prod(stored.shape[1:])
    start = stored.start + first * row_items * ITEM_BYTES[stored.dtype]
    count = len(target) * row_items
    if not count:
        return
    aligned = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = start - aligned + count * ITEM_BYTES[stored.dtype]
    with open(stored.file, "rb") as file:
        mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=aligned)  # torch wants it writable
    with closing(mapped):
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        items = torch.frombuffer(mapped, dtype=_DTYPES[stored.dtype], count=count, offset=start - aligned)
        rows = items.view(-1, *stored.shape[1:])
        target.copy_(rows if rows.dim() == 1 else rows[:, columns])
        del items, rows  # the map cannot be closed while a tensor looks at it


def _fill_inplace(part: Slice, sources: list[HfTensor], folder: HfFolder) -> None:
    first_row, rows = part.start[0], len(part.data)
    columns = slice(part.start[1], part.start[1] + part.data.shape[1]) if part.data.dim() > 1 else slice(None)
    filled = 0
    for tensor in sources:
        stored = folder.stored[tensor.theirs]
        for run in blocks_of(tensor, stored, folder.shape, first_row, first_row + rows):
            copy_rows_inplace(part.data[run.ours : run.ours + run.rows], stored, run.theirs, columns)
            filled += run.rows
    if sources[0].place == "vocabulary":
        part.data[filled:].zero_()
    else:
        assert filled == rows, f"{part.name}: {filled} of {rows} rows"

"""A Hugging Face folder as a checkpoint of ours: the pieces that it is written in, made one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megakd.model.checkpoint.stream_writer import Piece
from megakd.model.huggingface.families.table import HfTensor
from megakd.model.huggingface.folder import HfFolder
from megakd.model.huggingface.load import Slice, fill_slices_inplace, sources_of

_PIECE_BYTES = 1 << 23  # small enough for the cache of a processor, through which a piece goes four times
_LAYER = re.compile(r"^(decoder\.layers)\.(\d+)\.(.+)$")


def pieces_of(folder: HfFolder, *, vocab_size: int, dtype: torch.dtype) -> Iterator[Piece]:
    """Yield the pieces of a checkpoint of ``folder``, layer after layer, each of some 8 MiB at most.

    vocab_size: true vocabulary; the embedding has all rows of the folder's and padding behind them.
    """
    for (name, expert), tensors in sources_of(folder).items():
        yield from _pieces_of(folder, name, expert, tensors, vocab_size, dtype)


def _pieces_of(
    folder: HfFolder, name: str, expert: int | None, tensors: list[HfTensor], vocab_size: int, dtype: torch.dtype
) -> Iterator[Piece]:
    rows, columns = sum(tensor.size[0] for tensor in tensors), tensors[0].size[1:]
    if tensors[0].place == "vocabulary":
        rows = folder.shape.rows(vocab_size, 1)
    layer = _LAYER.match(name)
    stacks: list[tuple[int, int]] = []  # number of tensors that are stacked, and the index of this one
    if layer is not None:
        stacks.append((folder.shape.num_layers, int(layer[2])))
    if expert is not None:
        stacks.append((folder.shape.num_experts or 0, expert))
    stacked_name = name if layer is None else f"{layer[1]}.{layer[3]}"
    row_bytes = torch.Size(columns).numel() * dtype.itemsize
    at_once = max(1, _PIECE_BYTES // row_bytes)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        yield Piece(
            name=stacked_name,
            size=(*(size for size, _ in stacks), rows, *columns),
            offset=(*(index for _, index in stacks), first, *(0 for _ in columns)),
            lengths=(*(1 for _ in stacks), count, *columns),
            fill=partial(_fill_inplace, folder=folder, name=name, expert=expert, first=first, num_stacks=len(stacks)),
        )


def _fill_inplace(
    part: Tensor, *, folder: HfFolder, name: str, expert: int | None, first: int, num_stacks: int
) -> None:
    rows = part.view(part.shape[num_stacks:])
    fill_slices_inplace([Slice(name, expert, (first, *(0 for _ in rows.shape[1:])), rows)], folder)

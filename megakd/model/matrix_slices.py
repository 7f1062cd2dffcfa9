"""Cuts of whole matrices into the slices of tensor-parallel ranks, as megatron's layers hold them, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.model.gpt import partition_dim


def slice_matrix(whole: Tensor, name: str, *, rank: int, size: int, rows: int) -> Tensor:
    """Return the slice of a parameter that rank ``rank`` of ``size`` holds.

    name: the parameter's name. rows: of the slice, for an embedding or an output weight, whose padding is added here
    as rows of 0.
    """
    dim = partition_dim(name)
    if dim is None:
        return whole
    if _is_vocabulary(name):
        whole = F.pad(whole, (0, 0, 0, rows * size - whole.shape[0]))
    if "linear_fc1" in name:  # gate and up are each split, then stacked
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dim)[rank]


def join_slices(slices: Sequence[Tensor], name: str) -> Tensor:
    """Return the whole parameter from the slices of all ranks, in rank order; the inverse of `slice_matrix`.

    An embedding or an output weight keeps its rows of padding.
    """
    dim = partition_dim(name)
    if dim is None:
        return slices[0]
    if "linear_fc1" in name:
        halves = [part.chunk(2) for part in slices]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)])
    return torch.cat(list(slices), dim)


def _is_vocabulary(name: str) -> bool:
    return "word_embeddings" in name or "output_layer" in name

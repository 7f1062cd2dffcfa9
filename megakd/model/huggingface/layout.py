"""Rows of Hugging Face's tensors and of megatron's: which lie where, and the conversions in both directions.

megatron keeps queries, keys and values in one matrix, a key/value group after the other: the group's queries, its key,
its value. It keeps a feed-forward layer's gate and up in one matrix, all of the gate first. The embedding has padding
behind. All of it moves whole rows, so one list of `Run` says it all, for a matrix, a bias, or the slice of a rank.

Axes: ``R`` rows of one of our tensors, ``r`` rows of one of theirs, ``C`` columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megakd.model.config import ModelShape
from megakd.model.huggingface.families.table import Place


@dataclass(frozen=True)
class Run:
    """Consecutive rows that stay consecutive: ``rows`` of them, from row ``theirs`` of theirs and ``ours`` of ours."""

    theirs: int
    ours: int
    rows: int


def runs(place: Place, rows: int, shape: ModelShape) -> list[Run]:
    """Return where the rows of one of their tensors lie in ours. rows: of theirs."""
    if place in ("whole", "vocabulary", "gate"):
        return [Run(0, 0, rows)]
    if place == "up":
        return [Run(0, rows, rows)]
    width, queries = shape.kv_channels, shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
    group = queries + 2 * width
    part, first = {"query": (queries, 0), "key": (width, queries), "value": (width, queries + width)}[place]
    assert rows == part * shape.num_query_groups, f"{rows} rows of a {place}"
    return [Run(index * part, index * group + first, part) for index in range(shape.num_query_groups)]


def within(runs: Iterable[Run], start: int, stop: int) -> list[Run]:
    """Return the runs in the rows ``start`` to ``stop`` of ours, cut to them; ``ours`` counts from ``start`` then."""
    cut = []
    for run in runs:
        first, end = max(run.ours, start), min(run.ours + run.rows, stop)
        if first < end:
            cut.append(Run(run.theirs + first - run.ours, first - start, end - first))
    return cut


def to_ours(theirs: Mapping[Place, Tensor], shape: ModelShape) -> Tensor:
    """Return our tensor ``[R, C]`` (or ``[R]``) of their tensors ``[r, C]`` by place; without padding."""
    first = next(iter(theirs.values()))
    rows = sum(len(tensor) for tensor in theirs.values())
    ours = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device=first.device)
    for place, tensor in theirs.items():
        for run in runs(place, len(tensor), shape):
            ours[run.ours : run.ours + run.rows] = tensor[run.theirs : run.theirs + run.rows]
    return ours


def to_theirs(ours: Tensor, place: Place, rows: int, shape: ModelShape) -> Tensor:
    """Return their tensor ``[rows, C]`` (or ``[rows]``) in ``place`` of ours ``[R, C]``; padding is left out."""
    cut = runs(place, rows, shape)
    if len(cut) == 1:
        return ours[cut[0].ours : cut[0].ours + rows]
    return torch.cat([ours[run.ours : run.ours + run.rows] for run in cut])

"""A vocabulary split across a process group: who holds which ids, and how the statistics of a row are merged.

Axes: ``n`` ranks of the group, ``k`` statistics of a row, ``R`` rows (tokens of one chunk), ``v`` this rank's slice of
the vocabulary ``V``.

Every rank sums over its own slice relative to its own maximum. A log-sum-exp merge is associative, so the parts travel
once, packed, in one all-gather, and every rank merges them in rank order: the results are the same bits everywhere.
Formulas are in ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LM_COLUMNS = ("lm_max", "lm_sum", "label")
"""What the LM loss needs of a row: max s, sum of exp(s - max), the label's logit (0 on ranks that lack the label)."""

DENSE_COLUMNS = ("student_max", "student_sum", "teacher_max", "teacher_sum", "teacher_self", "agree")
"""What every divergence from dense targets needs. With s' = (s - student_max) / tau_s and t' = (t - teacher_max) /
tau_t: the sums of exp(s'), exp(t') and exp(t') t', and whether some id is a maximum of both rows (0 or 1)."""

SPARSE_COLUMNS = ("rest_max", "rest_sum")
"""What sparse targets need: maximum and sum as above over the ids that are not listed. The logits of those that are
travel behind, see ``RowStatistics.listed_KR``."""

SPREAD_COLUMNS = ("total", "count")
"""What tail ``spread`` needs beside: the sum of (s - lm_max) / tau_s over all ids, and how many they are."""


@dataclass(frozen=True)
class VocabShard:
    """The slice of the vocabulary that this rank's rows of an output weight stand for.

    start: vocabulary id of the first row of the shard.
    num_rows: rows ``v`` of the shard, padding included; the same on every rank of the group.
    vocab_size: the true vocabulary; ids from here on are padding and never enter a softmax.
    group: the ranks that hold the other slices; None for one process.
    """

    start: int
    num_rows: int
    vocab_size: int
    group: dist.ProcessGroup | None

    @property
    def num_valid(self) -> int:
        """Leading rows of the shard that are not padding."""
        return min(max(self.vocab_size - self.start, 0), self.num_rows)

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


@dataclass(frozen=True)
class RowStatistics:
    """Named statistics of rows: ``values_kR`` holds one line a column, fp32 (fp64 for fp64 logits)."""

    columns: tuple[str, ...]
    values_kR: Tensor

    def __getitem__(self, column: str) -> Tensor:
        return self.values_kR[self.columns.index(column)]

    @property
    def listed_KR(self) -> Tensor:
        """The lines behind the named ones: logits of the listed ids (0 on ranks that lack the id)."""
        return self.values_kR[len(self.columns) :]

    def extended(self, other: RowStatistics) -> RowStatistics:
        """These columns and those of another; neither has listed logits."""
        return RowStatistics(self.columns + other.columns, torch.cat([self.values_kR, other.values_kR]))


def pivot(maximum_R: Tensor) -> Tensor:
    """What is subtracted before exp: the maximum, or 0 where no entry is finite, because -inf - -inf is NaN."""
    return torch.where(maximum_R == -math.inf, 0.0, maximum_R)


class Gather:
    """One all-gather, under way: this rank's parts of the statistics of a chunk, packed."""

    def __init__(self, parts: Sequence[Tensor], shard: VocabShard) -> None:
        packed = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        k, num_rows = packed.shape
        self._sizes = [part.shape[0] for part in parts]
        self._gathered = packed.new_empty(shard.world_size, k, num_rows)
        self._work = dist.all_gather_into_tensor(
            self._gathered.view(shard.world_size * k, num_rows), packed.contiguous(), group=shard.group, async_op=True
        )

    def wait(self) -> list[Tensor]:
        """``[n, k, R]`` of each part, in rank order."""
        if self._work is not None:
            self._work.wait()
        return list(torch.split(self._gathered, self._sizes, dim=1))


def merge_statistics(
    columns: tuple[str, ...], parts_nkR: Tensor, *, student_temperature: float, teacher_temperature: float
) -> RowStatistics:
    """The statistics of whole rows from those of every slice, in rank order; the temperatures are those of the sums."""
    ranks_nR = dict(zip(columns, parts_nkR.unbind(1)))
    merged: dict[str, Tensor] = {}

    def merge_maximum(name: str, temperature: float) -> Tensor:
        """Merge a maximum; how much lower each rank's own pivot lies, in units of the temperature."""
        merged[name] = ranks_nR[name].amax(0)
        return (pivot(ranks_nR[name]) - pivot(merged[name])) / temperature

    if "lm_max" in columns:
        drop = merge_maximum("lm_max", 1.0)
        merged["lm_sum"] = _rescaled_sum(ranks_nR["lm_sum"], drop)
        if "total" in columns:
            merged["total"] = (ranks_nR["total"] + ranks_nR["count"] * (drop / student_temperature)).sum(0)
    if "rest_max" in columns:
        drop = merge_maximum("rest_max", student_temperature)
        merged["rest_sum"] = _rescaled_sum(ranks_nR["rest_sum"], drop)
    if "student_max" in columns:
        drop_s = merge_maximum("student_max", student_temperature)
        drop_t = merge_maximum("teacher_max", teacher_temperature)
        student_nR, teacher_nR = ranks_nR["student_sum"], ranks_nR["teacher_sum"]
        merged["student_sum"] = _rescaled_sum(student_nR, drop_s)
        merged["teacher_sum"] = _rescaled_sum(teacher_nR, drop_t)
        merged["teacher_self"] = _rescaled_sum(ranks_nR["teacher_self"] + teacher_nR * drop_t, drop_t)
        merged["agree"] = _shared_maximum(ranks_nR)
        if "forward" in columns:
            merged["forward"] = _rescaled_sum(ranks_nR["forward"] + teacher_nR * (drop_t - drop_s), drop_t)
        if "reverse" in columns:
            merged["reverse"] = _rescaled_sum(ranks_nR["reverse"] + student_nR * (drop_s - drop_t), drop_s)
    for name in ("student_top", "teacher_top"):
        if name in columns:
            merged[name] = ranks_nR[name].amax(0)
    for name in columns:  # plain sums: they are relative to nothing, or to what is already merged
        if name not in merged:
            merged[name] = ranks_nR[name].sum(0)
    lines = [merged[name] for name in columns]
    return RowStatistics(columns, torch.cat([torch.stack(lines), parts_nkR[:, len(columns) :].sum(0)]))


def _shared_maximum(ranks_nR: dict[str, Tensor]) -> Tensor:
    """1 where some id is the maximum of both whole rows."""
    student_nR = ranks_nR.get("student_top", ranks_nR["student_max"])
    teacher_nR = ranks_nR.get("teacher_top", ranks_nR["teacher_max"])
    at_top = (student_nR == student_nR.amax(0)) & (teacher_nR == teacher_nR.amax(0))
    return (at_top & (ranks_nR["agree"] > 0)).any(0).to(student_nR.dtype)


def _rescaled_sum(sums_nR: Tensor, drop_nR: Tensor) -> Tensor:
    """Sums relative to each rank's pivot, added up relative to the row's.

    A slice without mass adds exactly nothing, even where its sum is infinite or its pivot means nothing.
    """
    scale_nR = drop_nR.exp()
    return torch.where((sums_nR == 0) | (scale_nR == 0), 0.0, sums_nR * scale_nR).sum(0)

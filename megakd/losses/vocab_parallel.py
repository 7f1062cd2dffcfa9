"""A vocabulary split across a process group: the slice of each rank, and the merge of the statistics of a row.

Axes: ``n`` ranks of the group, ``k`` statistics of a row, ``R`` rows (tokens of one chunk), ``v`` this rank's slice of
the vocabulary ``V``.

Every rank sums over its own slice relative to its own maximum. A log-sum-exp merge is associative, so one all-gather of
the packed parts is enough. Every rank merges them in rank order, so all ranks hold the same bits.
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
"""Statistics of a row for the LM loss: max s, sum of exp(s - max), the label's logit (0 on ranks without it)."""

DENSE_COLUMNS = ("student_max", "student_sum", "teacher_max", "teacher_sum", "teacher_self", "agree")
"""Statistics of a row for every divergence from dense targets. With s' = (s - student_max) / tau_s and
t' = (t - teacher_max) / tau_t: the sums of exp(s'), exp(t') and exp(t') t', and 1 if some id is a maximum of both rows,
else 0."""

SPARSE_COLUMNS = ("rest_max", "rest_sum")
"""Statistics of a row for sparse targets: maximum and sum as above over the ids that are not listed. The logits of the
listed ids follow the named columns, see ``RowStatistics.listed_KR``."""

SPREAD_COLUMNS = ("total", "count")
"""Statistics of a row for tail ``spread`` besides: the sum of (s - lm_max) / tau_s over all ids, and their number."""


@dataclass(frozen=True)
class VocabShard:
    """The slice of the vocabulary that belongs to this rank's rows of an output weight.

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
        """Number of leading rows of the shard that are not padding."""
        return min(max(self.vocab_size - self.start, 0), self.num_rows)

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


@dataclass(frozen=True)
class RowStatistics:
    """Named statistics of rows. values_kR: one line for each column, fp32 (fp64 for fp64 logits)."""

    columns: tuple[str, ...]
    values_kR: Tensor

    def __getitem__(self, column: str) -> Tensor:
        return self.values_kR[self.columns.index(column)]

    @property
    def listed_KR(self) -> Tensor:
        """Lines after the named ones: logits ``[K, R]`` of the listed ids (0 on ranks without the id)."""
        return self.values_kR[len(self.columns) :]

    def extended(self, other: RowStatistics) -> RowStatistics:
        """Return these columns followed by those of another; neither may have logits of listed ids."""
        return RowStatistics(self.columns + other.columns, torch.cat([self.values_kR, other.values_kR]))


def pivot(maximum_R: Tensor) -> Tensor:
    """The number to subtract before exp: the maximum, or 0 where no entry is finite, because -inf - -inf is NaN."""
    return torch.where(maximum_R == -math.inf, 0.0, maximum_R)


class Gather:
    """One all-gather under way, of this rank's packed parts of the statistics of a chunk."""

    def __init__(self, parts: Sequence[Tensor], shard: VocabShard) -> None:
        packed = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        k, num_rows = packed.shape
        self._sizes = [part.shape[0] for part in parts]
        self._gathered = packed.new_empty(shard.world_size, k, num_rows)
        self._work = dist.all_gather_into_tensor(
            self._gathered.view(shard.world_size * k, num_rows), packed.contiguous(), group=shard.group, async_op=True
        )

    def wait(self) -> list[Tensor]:
        """Wait, and return ``[n, k, R]`` of each part, in rank order."""
        if self._work is not None:
            self._work.wait()
        return list(torch.split(self._gathered, self._sizes, dim=1))


def merge_statistics(
    columns: tuple[str, ...], parts_nkR: Tensor, *, student_temperature: float, teacher_temperature: float
) -> RowStatistics:
    """Merge the statistics of every slice ``[n, k, R]``, in rank order, into those of whole rows.

    student_temperature, teacher_temperature: the temperatures that the sums were made with.
    """
    ranks_nR = dict(zip(columns, parts_nkR.unbind(1)))
    merged: dict[str, Tensor] = {}

    def merge_maximum(name: str, temperature: float) -> Tensor:
        """Merge a maximum; return how far each rank's pivot lies below it (at most 0), divided by the temperature."""
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
    for name in columns:  # plain sums, relative to no maximum or to one that is merged already
        if name not in merged:
            merged[name] = ranks_nR[name].sum(0)
    lines = [merged[name] for name in columns]
    return RowStatistics(columns, torch.cat([torch.stack(lines), parts_nkR[:, len(columns) :].sum(0)]))


def _shared_maximum(ranks_nR: dict[str, Tensor]) -> Tensor:
    """Return 1 where some id is the maximum of both whole rows, else 0."""
    student_nR = ranks_nR.get("student_top", ranks_nR["student_max"])
    teacher_nR = ranks_nR.get("teacher_top", ranks_nR["teacher_max"])
    at_top = (student_nR == student_nR.amax(0)) & (teacher_nR == teacher_nR.amax(0))
    return (at_top & (ranks_nR["agree"] > 0)).any(0).to(student_nR.dtype)


def _rescaled_sum(sums_nR: Tensor, drop_nR: Tensor) -> Tensor:
    """Add up sums that are relative to each rank's pivot, relative to the row's.

    A slice without mass adds exactly nothing, even where its sum is infinite or its pivot is arbitrary.
    """
    scale_nR = drop_nR.exp()
    return torch.where((sums_nR == 0) | (scale_nR == 0), 0.0, sums_nR * scale_nR).sum(0)

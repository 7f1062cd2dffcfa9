"""A vocabulary split across a process group: who holds which ids, and how the statistics of a row are merged.

Axes: ``n`` ranks of the group, ``k`` statistics of a row, ``R`` rows (tokens of one chunk), ``v`` this rank's slice of
the vocabulary ``V``.

Every rank sums over its own slice relative to its own maximum. A log-sum-exp merge is associative, so the parts travel
once, packed, in one all-gather, and every rank merges them in rank order: the results are the same bits everywhere.
Formulas are in ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LM_COLUMNS = ("student_max", "student_sum", "label")
"""What the LM loss needs of a row: max s, sum of exp(s - max), the label's logit (0 on ranks that lack the label)."""

KD_COLUMNS = ("student_kd_sum", "teacher_max", "teacher_sum", "teacher_self", "agree")
"""What every divergence needs. With s' = (s - student_max) / tau_s and t' = (t - teacher_max) / tau_t: the sums of
exp(s'), exp(t') and exp(t') t', and whether some id is a maximum of both rows (0 or 1). Divergences may ask for more:
"forward" and "reverse", the sums of exp(t') (t' - s') and of exp(s') (s' - t')."""


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


def pivot(maximum_R: Tensor) -> Tensor:
    """What is subtracted before exp: the maximum, or 0 where no entry is finite, because -inf - -inf is NaN."""
    return torch.where(maximum_R == -math.inf, 0.0, maximum_R)


def gather_statistics(
    part: RowStatistics, *, shard: VocabShard, student_temperature: float, teacher_temperature: float
) -> RowStatistics:
    """The statistics of whole rows from this rank's part of them: one all-gather and a merge."""
    if shard.world_size == 1:
        return part
    k, num_rows = part.values_kR.shape
    gathered = part.values_kR.new_empty(shard.world_size * k, num_rows)
    dist.all_gather_into_tensor(gathered, part.values_kR.contiguous(), group=shard.group)
    return merge_statistics(
        part.columns,
        gathered.view(shard.world_size, k, num_rows),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


def merge_statistics(
    columns: tuple[str, ...], parts_nkR: Tensor, *, student_temperature: float, teacher_temperature: float
) -> RowStatistics:
    """The statistics of whole rows from those of every slice, in rank order; the temperatures are those of the sums."""
    ranks_nR = dict(zip(columns, parts_nkR.unbind(1)))

    merged: dict[str, Tensor] = {"label": ranks_nR["label"].sum(0)}
    # How much lower than the row's maximum each rank's own pivot lies, in logits.
    merged["student_max"] = ranks_nR["student_max"].amax(0)
    drop_s = pivot(ranks_nR["student_max"]) - pivot(merged["student_max"])
    merged["student_sum"] = _rescaled_sum(ranks_nR["student_sum"], drop_s)
    if "teacher_max" in columns:
        merged["teacher_max"] = ranks_nR["teacher_max"].amax(0)
        drop_t = (pivot(ranks_nR["teacher_max"]) - pivot(merged["teacher_max"])) / teacher_temperature
        drop_s = drop_s / student_temperature
        student_nR, teacher_nR = ranks_nR["student_kd_sum"], ranks_nR["teacher_sum"]
        merged["student_kd_sum"] = _rescaled_sum(student_nR, drop_s)
        merged["teacher_sum"] = _rescaled_sum(teacher_nR, drop_t)
        merged["teacher_self"] = _rescaled_sum(ranks_nR["teacher_self"] + teacher_nR * drop_t, drop_t)
        at_top = (ranks_nR["student_max"] == merged["student_max"]) & (ranks_nR["teacher_max"] == merged["teacher_max"])
        merged["agree"] = (at_top & (ranks_nR["agree"] > 0)).any(0).to(parts_nkR.dtype)
        if "forward" in columns:
            merged["forward"] = _rescaled_sum(ranks_nR["forward"] + teacher_nR * (drop_t - drop_s), drop_t)
        if "reverse" in columns:
            merged["reverse"] = _rescaled_sum(ranks_nR["reverse"] + student_nR * (drop_s - drop_t), drop_s)
    return RowStatistics(columns, torch.stack([merged[name] for name in columns]))


def _rescaled_sum(sums_nR: Tensor, drop_nR: Tensor) -> Tensor:
    """Sums relative to each rank's pivot, added up relative to the row's.

    A slice without mass adds exactly nothing, even where its sum is infinite or its pivot means nothing.
    """
    scale_nR = drop_nR.exp()
    return torch.where((sums_nR == 0) | (scale_nR == 0), 0.0, sums_nR * scale_nR).sum(0)

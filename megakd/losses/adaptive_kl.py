"""Head and tail of the teacher's distribution over a split vocabulary, whose gaps weigh the directions of adaptive KL.

Axes: ``R`` rows (tokens of one chunk), ``v`` this rank's slice of the vocabulary.

The head is the most probable ids whose probabilities add up to at most mu, and always the best one; ids of equal logits
enter together or not at all, so the head depends neither on the order of ids nor on their split. (Public versions of
AKL differ here; one applies a mask of sorted ids to unsorted gaps.)

The smallest logit of the head is found exactly, without sorting, by its bits: logits are mapped to integers of the same
order, and four rounds each settle eight bits from a histogram of mass, added up over the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses.divergences import column
from megakd.losses.kernels.protocol import Chunk, DenseTeacher
from megakd.losses.vocab_parallel import RowStatistics, VocabShard, pivot

_BITS, _ROUNDS = 8, 4


def head_and_tail_gap(chunk: Chunk, rows: RowStatistics, shard: VocabShard) -> RowStatistics:
    """Sum |p - q| over the ids of this slice, in the head and in the tail: columns ``head_gap`` and ``tail_gap``.

    Takes four all-reduces of ``[R, 256]`` over the group.
    """
    teacher = chunk.teacher
    assert isinstance(teacher, DenseTeacher)
    term, n = teacher.term, chunk.num_valid
    wide = rows.values_kR.dtype
    teacher_Rv, student_Rv = teacher.logits_Rv[:, :n].to(wide), chunk.student_Rv[:, :n].to(wide)
    t_Rv = (teacher_Rv - column(pivot(rows["teacher_max"]))) / term.temperature
    s_Rv = (student_Rv - column(pivot(rows["student_max"]))) / term.student_temperature
    p_Rv = t_Rv.exp() / column(rows["teacher_sum"])
    gap_Rv = (p_Rv - s_Rv.exp() / column(rows["student_sum"])).abs()
    keys_Rv = _ordered_keys(teacher_Rv)
    outside_R = _largest_key_outside(keys_Rv, p_Rv, term.akl_mu, shard)
    is_head_Rv = (keys_Rv > column(outside_R)) | (teacher_Rv == column(rows["teacher_max"]))
    head_R = torch.where(is_head_Rv, gap_Rv, 0.0).sum(1)
    return RowStatistics(("head_gap", "tail_gap"), torch.stack([head_R, gap_Rv.sum(1) - head_R]))


def _ordered_keys(logits_Rv: Tensor) -> Tensor:
    """Map logits to int64 in [0, 2^32) of the same order as their fp32 values."""
    bits_Rv = logits_Rv.float().add(0.0).view(torch.int32).long()  # + 0 turns -0 into 0
    return torch.where(bits_Rv < 0, ~bits_Rv, bits_Rv + (1 << 31))


def _largest_key_outside(keys_Rv: Tensor, p_Rv: Tensor, mass: float, shard: VocabShard) -> Tensor:
    """Find the largest key at which the mass of all ids with this key or a larger one exceeds ``mass``.

    Returns int64 ``[R]``, -1 where the mass of all ids does not exceed it.
    """
    prefix_R = keys_Rv.new_zeros(keys_Rv.shape[0])
    above_R = p_Rv.new_zeros(keys_Rv.shape[0])  # mass of larger prefixes
    for round_ in range(_ROUNDS):
        shift = _BITS * (_ROUNDS - 1 - round_)
        inside_Rv = (keys_Rv >> (shift + _BITS)) == column(prefix_R)
        digit_Rv = (keys_Rv >> shift) & ((1 << _BITS) - 1)
        mass_Rb = p_Rv.new_zeros(keys_Rv.shape[0], 1 << _BITS)
        mass_Rb.scatter_add_(1, digit_Rv, torch.where(inside_Rv, p_Rv, 0.0))
        if shard.world_size > 1:
            dist.all_reduce(mass_Rb, group=shard.group)
        # mass of each digit and all larger ones; the digit sought is the largest at which the total exceeds the mass
        reached_Rb = mass_Rb.flip(1).cumsum(1).flip(1)
        digit_R = ((reached_Rb + column(above_R) > mass).sum(1) - 1).clamp(min=0)
        above_R = above_R + (reached_Rb - mass_Rb).gather(1, column(digit_R)).squeeze(1)
        prefix_R = (prefix_R << _BITS) | digit_R
    total_R = above_R + mass_Rb.gather(1, column(digit_R)).squeeze(1)
    return torch.where(total_R > mass, prefix_R, -1)

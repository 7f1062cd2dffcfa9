"""Head and tail of the teacher's distribution over a split vocabulary, whose gaps weigh the directions of adaptive KL.

Axes: ``R`` rows (tokens of one chunk), ``v`` this rank's slice of the vocabulary.

The head is the most probable ids whose probabilities add up to at most mu, and always the best one; ids of equal logits
enter together or not at all, so the head depends neither on the order of ids nor on their split. (Public versions of
AKL differ here; one applies a mask of sorted ids to unsorted gaps.)

The smallest logit of the head is found exactly, without sorting, by its bits: logits are mapped to integers of the same
order, and each round settles the next bits from a histogram of mass, added up over the group: four rounds of eight bits
in torch, eight of four bits in the GPU's kernels.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.losses.divergences import column
from megakd.losses.kernels.protocol import Chunk, DenseTeacher
from megakd.losses.vocab_parallel import RowStatistics, VocabShard, pivot

_KEY_BITS = 32


@runtime_checkable
class HeadSearch(Protocol):
    """The passes over a chunk's logits that the search for the head makes. digit_bits: a divisor of 32.

    rows: merged statistics of the first pass.
    """

    digit_bits: int

    def digit_mass(self, chunk: Chunk, rows: RowStatistics, prefix_R: Tensor, *, shift: int) -> Tensor:
        """Sum the probabilities of this slice's ids by a digit of their keys, fp32 ``[R, 2^digit_bits]``.

        Only ids count whose key, without its last ``shift + digit_bits`` bits, is ``prefix_R``, int64 ``[R]``; the
        digit is what follows there.
        """

    def gaps(self, chunk: Chunk, rows: RowStatistics, outside_R: Tensor) -> Tensor:
        """Sum |p - q| over this slice's ids in the head and in the tail, ``[2, R]``.

        outside_R: int64 ``[R]``, the largest key outside the head; the largest logit is in it all the same.
        """


def head_and_tail_gap(chunk: Chunk, rows: RowStatistics, shard: VocabShard, kernels: object = None) -> RowStatistics:
    """Sum |p - q| over the ids of this slice, in the head and in the tail: columns ``head_gap`` and ``tail_gap``.

    kernels: makes the passes if it is a `HeadSearch`; else torch does. Takes an all-reduce of ``[R, 256]`` over the
    group in each of four rounds, of ``[R, 16]`` in each of eight on a GPU.
    """
    assert isinstance(chunk.teacher, DenseTeacher)
    search = kernels if isinstance(kernels, HeadSearch) else _TorchSearch(chunk, rows)
    outside_R = _largest_key_outside(search, chunk, rows, chunk.teacher.term.akl_mu, shard)
    return RowStatistics(("head_gap", "tail_gap"), search.gaps(chunk, rows, outside_R))


class _TorchSearch:
    """`HeadSearch` of one chunk in torch; keeps its keys and probabilities."""

    digit_bits = 8

    def __init__(self, chunk: Chunk, rows: RowStatistics) -> None:
        teacher = chunk.teacher
        assert isinstance(teacher, DenseTeacher)
        term, n = teacher.term, chunk.num_valid
        wide = rows.values_kR.dtype
        self._teacher_Rv, student_Rv = teacher.logits_Rv[:, :n].to(wide), chunk.student_Rv[:, :n].to(wide)
        t_Rv = (self._teacher_Rv - column(pivot(rows["teacher_max"]))) / term.temperature
        s_Rv = (student_Rv - column(pivot(rows["student_max"]))) / term.student_temperature
        self._p_Rv = t_Rv.exp() / column(rows["teacher_sum"])
        self._gap_Rv = (self._p_Rv - s_Rv.exp() / column(rows["student_sum"])).abs()
        self._keys_Rv = _ordered_keys(self._teacher_Rv)

    def digit_mass(self, chunk: Chunk, rows: RowStatistics, prefix_R: Tensor, *, shift: int) -> Tensor:
        inside_Rv = (self._keys_Rv >> (shift + self.digit_bits)) == column(prefix_R)
        digit_Rv = (self._keys_Rv >> shift) & ((1 << self.digit_bits) - 1)
        mass_Rb = self._p_Rv.new_zeros(self._p_Rv.shape[0], 1 << self.digit_bits)
        return mass_Rb.scatter_add_(1, digit_Rv, torch.where(inside_Rv, self._p_Rv, 0.0))

    def gaps(self, chunk: Chunk, rows: RowStatistics, outside_R: Tensor) -> Tensor:
        is_head_Rv = (self._keys_Rv > column(outside_R)) | (self._teacher_Rv == column(rows["teacher_max"]))
        head_R = torch.where(is_head_Rv, self._gap_Rv, 0.0).sum(1)
        return torch.stack([head_R, self._gap_Rv.sum(1) - head_R])


def _ordered_keys(logits_Rv: Tensor) -> Tensor:
    """Map logits to int64 in [0, 2^32) of the same order as their fp32 values."""
    bits_Rv = logits_Rv.float().add(0.0).view(torch.int32).long()  # + 0 turns -0 into 0
    return torch.where(bits_Rv < 0, ~bits_Rv, bits_Rv + (1 << 31))


def _largest_key_outside(
    search: HeadSearch, chunk: Chunk, rows: RowStatistics, mass: float, shard: VocabShard
) -> Tensor:
    """Find the largest key at which the mass of all ids with this key or a larger one exceeds ``mass``.

    Returns int64 ``[R]``, -1 where the mass of all ids does not exceed it.
    """
    num_rows, device, bits = rows.values_kR.shape[1], rows.values_kR.device, search.digit_bits
    prefix_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
    above_R = rows.values_kR.new_zeros(num_rows)  # mass of larger prefixes
    for shift in range(_KEY_BITS - bits, -1, -bits):
        mass_Rb = search.digit_mass(chunk, rows, prefix_R, shift=shift)
        if shard.world_size > 1:
            dist.all_reduce(mass_Rb, group=shard.group)
        # mass of each digit and all larger ones; the digit sought is the largest at which the total exceeds the mass
        reached_Rb = mass_Rb.flip(1).cumsum(1).flip(1)
        digit_R = ((reached_Rb + column(above_R) > mass).sum(1) - 1).clamp(min=0)
        above_R = above_R + (reached_Rb - mass_Rb).gather(1, column(digit_R)).squeeze(1)
        prefix_R = (prefix_R << bits) | digit_R
    total_R = above_R + mass_Rb.gather(1, column(digit_R)).squeeze(1)
    return torch.where(total_R > mass, prefix_R, -1)

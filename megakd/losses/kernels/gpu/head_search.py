"""The Triton kernels that find the head of the teacher's distribution and weigh both sides of it, for adaptive KL.

One program a row, as in ``statistics.py``: sums have one order, so that a row's result is always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakd.losses.kernels.gpu.formulas import pivot
from megakd.losses.kernels.gpu.statistics import (
    NOT_SPECIAL,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    load_logits,
)


@triton.jit
def ordered_key(logits):
    """Map fp32 logits to integers in [0, 2^32) of the same order, as ``adaptive_kl.py`` does."""
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True).to(tl.int64)  # -0 is 0
    return tl.where(bits < 0, -1 - bits, bits + 2147483648)


@triton.jit(do_not_specialize=[*NOT_SPECIAL, "shift"])
def digit_mass(
    teacher,
    rows,
    prefix,
    out,
    num_rows,
    num_valid,
    width,
    teacher_stride,
    inverse_tau_t,
    shift,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the probabilities of the ids whose key has this row's prefix, by the next digit of the key."""
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    rows += row
    digits = tl.arange(0, 1 << BITS)
    t_pivot = pivot(tl.load(rows + num_rows * TEACHER_MAX))
    t_sum = tl.load(rows + num_rows * TEACHER_SUM)
    wanted = tl.load(prefix + row)
    mass = tl.zeros([1 << BITS], tl.float32)
    for start in range(0, num_valid, BLOCK):
        t = load_logits(teacher, start, num_valid, width, BLOCK)
        key = ordered_key(t) >> shift
        p = tl.exp((t - t_pivot) * inverse_tau_t) / t_sum
        p = tl.where((key >> BITS) == wanted, p, 0.0)
        digit = (key & ((1 << BITS) - 1)).to(tl.int32)
        mass += tl.sum(tl.where(digit[None, :] == digits[:, None], p[None, :], 0.0), 1)
    tl.store(out + (row << BITS) + digits, mass)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def head_and_tail_gaps(
    student,
    teacher,
    rows,
    outside,
    out,
    num_rows,
    num_valid,
    width,
    student_stride,
    teacher_stride,
    inverse_tau_s,
    inverse_tau_t,
    BLOCK: tl.constexpr,
):
    """Sum |p - q| over the head, ids with a key above ``outside`` or the largest logit, and over the tail."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    rows += row
    s_pivot = pivot(tl.load(rows + num_rows * STUDENT_MAX))
    t_max = tl.load(rows + num_rows * TEACHER_MAX)
    t_pivot = pivot(t_max)
    s_sum = tl.load(rows + num_rows * STUDENT_SUM)
    t_sum = tl.load(rows + num_rows * TEACHER_SUM)
    last_outside = tl.load(outside + row)
    head = tl.zeros([BLOCK], tl.float32)
    tail = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_valid, BLOCK):
        s = load_logits(student, start, num_valid, width, BLOCK)
        t = load_logits(teacher, start, num_valid, width, BLOCK)
        p = tl.exp((t - t_pivot) * inverse_tau_t) / t_sum
        gap = tl.abs(p - tl.exp((s - s_pivot) * inverse_tau_s) / s_sum)
        is_head = (ordered_key(t) > last_outside) | (t == t_max)
        head += tl.where(is_head, gap, 0.0)
        tail += tl.where(is_head, 0.0, gap)
    tl.store(out + row, tl.sum(head, 0))
    tl.store(out + num_rows + row, tl.sum(tail, 0))

"""The Triton kernels that sum over rows of logits: one program a row, one read of its logits.

A program walks over its slice in blocks. It keeps the maxima so far and running sums of groups of neighbours, and
rescales the sums when a maximum rises. That happens a few times in a row, so the walk costs little more than the
exponentials. Sums are fp32. ``row`` is int64: a chunk may have more than 2^31 logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakd.losses.kernels.gpu.formulas import (
    finite_difference,
    logit_difference,
    pivot,
    possible,
    product,
    value_and_slope,
)

# Lines of the columns in the statistics of a row: LM_COLUMNS, then DENSE_COLUMNS and the divergence's own sums, or
# SPARSE_COLUMNS, see vocab_parallel.py.
LM_MAX, LM_SUM, LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STUDENT_MAX, STUDENT_SUM = tl.constexpr(3), tl.constexpr(4)
TEACHER_MAX, TEACHER_SUM, TEACHER_SELF, AGREE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
FIRST = tl.constexpr(9)
GROUP = tl.constexpr(8)  # 16-bit logits that a thread loads at once
NOT_SPECIAL = ["num_rows", "num_valid", "num_listed", "num_words"]  # arguments whose value does not make another kernel
REST_MAX, REST_SUM, TOTAL, COUNT = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def load_logits(row, start, num_valid, width, BLOCK: tl.constexpr):
    """Load a block of logits in fp32, with -inf for padding.

    The load is masked by the row's end and not by that of the valid columns, which seldom is a multiple of the width of
    one load.
    """
    columns = start + tl.arange(0, BLOCK)
    logits = tl.load(row + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    if start + BLOCK > num_valid:
        logits = tl.where(columns < num_valid, logits, float("-inf"))
    return logits


@triton.jit
def load_owned(row, columns, num_valid):
    """Load single columns: True for those that this slice holds, and their logits, 0 for the others."""
    owned = (columns >= 0) & (columns < num_valid)
    return owned, tl.load(row + columns, mask=owned, other=0.0).to(tl.float32)


@triton.jit
def by_group(values, BLOCK: tl.constexpr):
    """Add up groups of neighbouring entries, which one thread holds: running sums of each would fill its registers."""
    return tl.sum(tl.reshape(values, [BLOCK // GROUP, GROUP]), 1)


@triton.jit
def fall(old, new):
    """Old maximum minus the new one; 0 if the old one is that of no entry."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit
def shrink(old, new, inverse_tau):
    """exp of the fall times inverse_tau; 0 if the old maximum is that of no entry."""
    return tl.where(old == float("-inf"), 0.0, tl.exp((old - new) * inverse_tau))


@triton.jit
def rescaled(sums, scale):
    """Sums rescaled to another maximum; with a scale of 0 exactly 0, even if they are infinite; NaN stays."""
    return tl.where(scale == 0.0, tl.where(sums == sums, 0.0, sums), sums * scale)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def mark_listed(columns, hits, num_listed, num_valid, num_words, K_BLOCK: tl.constexpr):
    """Set one bit for each listed column of the slice."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K_BLOCK)
    listed = tl.load(columns + row * num_listed + slots, mask=slots < num_listed, other=-1)
    owned = (listed >= 0) & (listed < num_valid)
    bits = tl.full([K_BLOCK], 1, tl.int32) << (listed % 32).to(tl.int32)
    tl.atomic_or(hits + row * num_words + listed // 32, bits, mask=owned)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def student_statistics(
    student,
    label,
    columns,
    hits,
    out,
    num_rows,
    num_valid,
    width,
    stride,
    num_listed,
    num_words,
    inverse_tau,
    SPARSE: tl.constexpr,
    SPREAD: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Make LM_COLUMNS; with SPARSE also the columns of sparse targets, from sums that leave the listed ids out."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    out += row
    lanes = tl.arange(0, BLOCK)
    maximum = float("-inf")
    lm_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    rest_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(0, num_valid, BLOCK):
        s = load_logits(student, start, num_valid, width, BLOCK)
        kept = s
        if SPARSE:
            word = tl.load(hits + row * num_words + (start + lanes) // 32, mask=start + lanes < width, other=0)
            kept = tl.where(((word >> (lanes % 32)) & 1) != 0, float("-inf"), s)  # a block starts with a word
        top = tl.max(kept, 0)
        if top > maximum:
            lm_sum = rescaled(lm_sum, shrink(maximum, top, 1.0))
            if TEMPERED:
                rest_sum = rescaled(rest_sum, shrink(maximum, top, inverse_tau))
            if SPREAD:  # each running sum holds GROUP entries of every block before
                total += (start // BLOCK * GROUP) * (pivot(maximum) - top)
            maximum = top
        lm_sum += by_group(tl.exp(kept - pivot(maximum)), BLOCK)
        if TEMPERED:
            rest_sum += by_group(tl.exp((kept - pivot(maximum)) * inverse_tau), BLOCK)
        if SPREAD:
            total += by_group(tl.where(start + lanes < num_valid, s - pivot(maximum), 0.0), BLOCK)
    lm_max = maximum
    lm_all = tl.sum(lm_sum, 0)
    if SPARSE:
        tl.store(out + num_rows * REST_MAX, maximum)
        if TEMPERED:
            tl.store(out + num_rows * REST_SUM, tl.sum(rest_sum, 0))
        else:
            tl.store(out + num_rows * REST_SUM, lm_all)
        slots = tl.arange(0, K_BLOCK)
        ids = tl.load(columns + row * num_listed + slots, mask=slots < num_listed, other=-1)
        owned, listed = load_owned(student, ids, num_valid)
        if SPREAD:
            first_line = COUNT + 1
        else:
            first_line = REST_SUM + 1
        tl.store(out + num_rows * (first_line + slots), listed, mask=slots < num_listed)
        listed = tl.where(owned, listed, float("-inf"))
        lm_max = tl.maximum(maximum, tl.max(listed, 0))
        lm_all = rescaled(lm_all, shrink(maximum, lm_max, 1.0)) + tl.sum(tl.exp(listed - pivot(lm_max)), 0)
        if SPREAD:
            all_ids = tl.sum(total, 0) + num_valid * (pivot(maximum) - pivot(lm_max))
            tl.store(out + num_rows * TOTAL, all_ids * inverse_tau)
            tl.store(out + num_rows * COUNT, num_valid + 0.0)
    tl.store(out + num_rows * LM_MAX, lm_max)
    tl.store(out + num_rows * LM_SUM, lm_all)
    _, at_label = load_owned(student, tl.load(label + row), num_valid)
    tl.store(out + num_rows * LABEL, at_label)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def dense_statistics(
    student,
    teacher,
    label,
    out,
    num_rows,
    num_valid,
    width,
    student_stride,
    teacher_stride,
    inverse_tau_s,
    inverse_tau_t,
    SUMS: tl.constexpr,
    LABEL_APART: tl.constexpr,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make LM_COLUMNS, DENSE_COLUMNS and the divergence's sums of the first pass.

    SUMS is forward, reverse, both, difference, square or none. With LABEL_APART (decoupled) sums leave the label out.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    out += row
    label_at = tl.load(label + row)
    lanes = tl.arange(0, BLOCK)
    s_max = float("-inf")
    t_max = float("-inf")
    agree = 0
    lm_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    s_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    t_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    t_self = tl.zeros([BLOCK // GROUP], tl.float32)
    forward = tl.zeros([BLOCK // GROUP], tl.float32)
    reverse = tl.zeros([BLOCK // GROUP], tl.float32)
    moment = tl.zeros([BLOCK // GROUP], tl.float32)
    count = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(0, num_valid, BLOCK):
        s = load_logits(student, start, num_valid, width, BLOCK)
        t = load_logits(teacher, start, num_valid, width, BLOCK)
        if LABEL_APART:
            s = tl.where(start + lanes == label_at, float("-inf"), s)
            t = tl.where(start + lanes == label_at, float("-inf"), t)
        s_block, t_block = tl.max(s, 0), tl.max(t, 0)
        if (s_block > s_max) | (t_block > t_max):
            s_top, t_top = tl.maximum(s_max, s_block), tl.maximum(t_max, t_block)
            s_fall, t_fall = fall(s_max, s_top) * inverse_tau_s, fall(t_max, t_top) * inverse_tau_t
            s_scale, t_scale = shrink(s_max, s_top, inverse_tau_s), shrink(t_max, t_top, inverse_tau_t)
            if SUMS == "forward" or SUMS == "both":
                forward = rescaled(forward + t_sum * (t_fall - s_fall), t_scale)
            if SUMS == "reverse" or SUMS == "both":
                reverse = rescaled(reverse + s_sum * (s_fall - t_fall), s_scale)
            t_self = rescaled(t_self + t_sum * t_fall, t_scale)
            t_sum = rescaled(t_sum, t_scale)
            s_sum = rescaled(s_sum, s_scale)
            if TEMPERED:
                lm_sum = rescaled(lm_sum, shrink(s_max, s_top, 1.0))
            s_max = s_top
            t_max = t_top
            agree = 0
        if (s_block == s_max) & (t_block == t_max):
            tops = (s == s_max) & (t == t_max) & (start + lanes < num_valid)
            agree = tl.maximum(agree, tl.max(tops.to(tl.int32), 0))
        if SUMS == "difference" or SUMS == "square":
            difference = logit_difference(s, t, inverse_tau_s, inverse_tau_t)
            if SUMS == "difference":
                moment += by_group(finite_difference(difference), BLOCK)
            else:
                moment += by_group(difference * difference, BLOCK)
            count += by_group(possible(s, t, tl.full([BLOCK], 1.0, tl.float32)), BLOCK)
        s -= pivot(s_max)
        if TEMPERED:
            lm_sum += by_group(tl.exp(s), BLOCK)
            s *= inverse_tau_s
        t = (t - pivot(t_max)) * inverse_tau_t
        exp_s, exp_t = tl.exp(s), tl.exp(t)
        s_sum += by_group(exp_s, BLOCK)
        t_sum += by_group(exp_t, BLOCK)
        t_self += by_group(product(exp_t, t), BLOCK)
        if SUMS == "forward" or SUMS == "both":
            forward += by_group(product(exp_t, t - s), BLOCK)
        if SUMS == "reverse" or SUMS == "both":
            reverse += by_group(product(exp_s, s - t), BLOCK)
    student_sum = tl.sum(s_sum, 0)
    lm_max, lm_all = s_max, student_sum
    if TEMPERED:
        lm_all = tl.sum(lm_sum, 0)
    owned, s_label = load_owned(student, label_at, num_valid)
    if LABEL_APART:
        _, t_label = load_owned(teacher, label_at, num_valid)
        s_own, t_own = tl.where(owned, s_label, float("-inf")), tl.where(owned, t_label, float("-inf"))
        lm_max, t_top = tl.maximum(s_max, s_own), tl.maximum(t_max, t_own)
        lm_all = rescaled(lm_all, shrink(s_max, lm_max, 1.0)) + tl.exp(s_own - pivot(lm_max))
        others_agree = (agree > 0) & (s_max == lm_max) & (t_max == t_top)
        agree = (others_agree | (owned & (s_own == lm_max) & (t_own == t_top))).to(tl.int32)
        tl.store(out + num_rows * (FIRST + 1), s_label)
        tl.store(out + num_rows * (FIRST + 2), t_label)
        tl.store(out + num_rows * (FIRST + 3), lm_max)
        tl.store(out + num_rows * (FIRST + 4), t_top)
    tl.store(out + num_rows * LM_MAX, lm_max)
    tl.store(out + num_rows * LM_SUM, lm_all)
    tl.store(out + num_rows * LABEL, s_label)
    tl.store(out + num_rows * STUDENT_MAX, s_max)
    tl.store(out + num_rows * STUDENT_SUM, student_sum)
    tl.store(out + num_rows * TEACHER_MAX, t_max)
    tl.store(out + num_rows * TEACHER_SUM, tl.sum(t_sum, 0))
    tl.store(out + num_rows * TEACHER_SELF, tl.sum(t_self, 0))
    tl.store(out + num_rows * AGREE, agree + 0.0)
    if SUMS == "forward" or SUMS == "both":
        tl.store(out + num_rows * FIRST, tl.sum(forward, 0))
    if SUMS == "both":
        tl.store(out + num_rows * (FIRST + 1), tl.sum(reverse, 0))
    if SUMS == "reverse":
        tl.store(out + num_rows * FIRST, tl.sum(reverse, 0))
    if SUMS == "difference" or SUMS == "square":
        tl.store(out + num_rows * FIRST, tl.sum(moment, 0))
        tl.store(out + num_rows * (FIRST + 1), tl.sum(count, 0))


@triton.jit(do_not_specialize=NOT_SPECIAL)
def dense_second_pass(
    student,
    teacher,
    rows,
    out,
    num_rows,
    num_valid,
    width,
    student_stride,
    teacher_stride,
    inverse_tau_s,
    inverse_tau_t,
    x,
    y,
    log_on_p,
    log_on_q,
    FORMULA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the sums of the second pass: square of centred_logit_mse, value and slope of the others."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    rows += row
    out += row
    first_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    second_sum = tl.zeros([BLOCK // GROUP], tl.float32)
    if FORMULA == "centred_logit_mse":
        mean = tl.load(rows + num_rows * FIRST) / tl.load(rows + num_rows * (FIRST + 1))
    else:
        s_pivot = pivot(tl.load(rows + num_rows * STUDENT_MAX))
        t_pivot = pivot(tl.load(rows + num_rows * TEACHER_MAX))
        log_s_sum = tl.log(tl.load(rows + num_rows * STUDENT_SUM))
        log_t_sum = tl.log(tl.load(rows + num_rows * TEACHER_SUM))
    for start in range(0, num_valid, BLOCK):
        s = load_logits(student, start, num_valid, width, BLOCK)
        t = load_logits(teacher, start, num_valid, width, BLOCK)
        if FORMULA == "centred_logit_mse":
            centred = possible(s, t, logit_difference(s, t, inverse_tau_s, inverse_tau_t) - mean)
            first_sum += by_group(centred * centred, BLOCK)
        else:
            log_q = (s - s_pivot) * inverse_tau_s - log_s_sum
            log_p = (t - t_pivot) * inverse_tau_t - log_t_sum
            value, slope = value_and_slope(
                FORMULA, log_p, log_q, tl.exp(log_p), tl.exp(log_q), x, y, log_on_p, log_on_q
            )
            first_sum += by_group(value, BLOCK)
            second_sum += by_group(slope, BLOCK)
    tl.store(out, tl.sum(first_sum, 0))
    if FORMULA != "centred_logit_mse":
        tl.store(out + num_rows, tl.sum(second_sum, 0))

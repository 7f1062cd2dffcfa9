"""The Triton kernels that turn rows of logits into their own gradient: one program a row, one read, one write.

``rows`` are the merged statistics, one line for each column. A weight of 0 keeps the NaN of its term out of the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megakd.losses.kernels.gpu.formulas import (
    kl_slope,
    logit_difference,
    pivot,
    possible,
    product,
    value_and_slope,
    weighted,
)
from megakd.losses.kernels.gpu.statistics import (
    FIRST,
    LM_MAX,
    LM_SUM,
    NOT_SPECIAL,
    REST_MAX,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    load_logits,
)


@triton.jit
def softmax_weight(rows, lm_weight, z_weight, num_rows, HAS_Z: tl.constexpr):
    """Factor of exp(s - max) in the gradient of LM and z-loss: lm / sum + 2 z log_z / sum."""
    weight = tl.load(lm_weight)
    lm_sum = tl.load(rows + num_rows * LM_SUM)
    if HAS_Z:
        log_z = tl.load(rows + num_rows * LM_MAX) + tl.log(lm_sum)
        weight += weighted(tl.load(z_weight), 2.0 * log_z)
    return weighted(weight, 1.0 / lm_sum)


@triton.jit
def store_gradient(row, start, gradient, num_valid, width, BLOCK: tl.constexpr):
    """Store a block of gradient in the student's dtype, with 0 for padding."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK > num_valid:
        gradient = tl.where(columns < num_valid, gradient, 0.0)
    tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def student_gradient(
    student,
    rows,
    label,
    lm_weight,
    z_weight,
    factor,
    shift,
    num_rows,
    num_valid,
    width,
    stride,
    inverse_tau,
    SPARSE: tl.constexpr,
    HAS_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of LM and z-loss; with SPARSE also the share of sparse targets, in the form for ids not listed."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    rows += row
    label_at = tl.load(label + row)
    label_weight = tl.load(lm_weight + row)
    on_softmax = softmax_weight(rows, lm_weight + row, z_weight + row, num_rows, HAS_Z)
    lm_pivot = pivot(tl.load(rows + num_rows * LM_MAX))
    if SPARSE:
        rest_pivot = pivot(tl.load(rows + num_rows * REST_MAX))
        row_factor, row_shift = tl.load(factor + row), tl.load(shift + row)
    for start in range(0, width, BLOCK):
        s = load_logits(student, start, num_valid, width, BLOCK)
        gradient = weighted(on_softmax, tl.exp(s - lm_pivot))
        gradient -= tl.where(start + tl.arange(0, BLOCK) == label_at, label_weight, 0.0)
        if SPARSE:
            gradient += weighted(row_factor, tl.exp((s - rest_pivot) * inverse_tau)) - row_shift
        store_gradient(student, start, gradient, num_valid, width, BLOCK)


@triton.jit(do_not_specialize=NOT_SPECIAL)
def sparse_gradient(
    student,
    columns,
    rows,
    listed_logits,
    slope,
    label,
    lm_weight,
    z_weight,
    num_rows,
    num_valid,
    stride,
    num_listed,
    HAS_Z: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """Gradient of the listed ids, written over that of ``student_gradient``; their logits come from the statistics.

    listed_logits, slope: ``[K, R]``.
    """
    row = tl.program_id(0).to(tl.int64)
    rows += row
    slots = tl.arange(0, K_BLOCK)
    filled = slots < num_listed
    ids = tl.load(columns + row * num_listed + slots, mask=filled, other=-1)
    s = tl.load(listed_logits + row + num_rows * slots, mask=filled, other=0.0)
    gradient = tl.load(slope + row + num_rows * slots, mask=filled, other=0.0)
    on_softmax = softmax_weight(rows, lm_weight + row, z_weight + row, num_rows, HAS_Z)
    gradient += weighted(on_softmax, tl.exp(s - pivot(tl.load(rows + num_rows * LM_MAX))))
    gradient -= tl.where(ids == tl.load(label + row), tl.load(lm_weight + row), 0.0)
    owned = filled & (ids >= 0) & (ids < num_valid)
    tl.store(student + row * stride + ids, gradient.to(student.dtype.element_ty), mask=owned)


@triton.jit
def log_odds(rows, num_rows, label_line, max_line, sum_line, inverse_tau):
    """log of p_y / (1 - p_y), from sums that leave the label out."""
    label = (tl.load(rows + num_rows * label_line) - pivot(tl.load(rows + num_rows * max_line))) * inverse_tau
    return label - tl.log(tl.load(rows + num_rows * sum_line))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=NOT_SPECIAL)
def dense_gradient(
    student,
    teacher,
    rows,
    label,
    lm_weight,
    z_weight,
    kd_weight,
    num_rows,
    num_valid,
    width,
    student_stride,
    teacher_stride,
    inverse_tau_s,
    inverse_tau_t,
    scale,
    x,
    y,
    log_on_p,
    log_on_q,
    FORMULA: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_Z: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of LM, z-loss and a divergence from dense targets.

    scale: factor on the divergence's slope beside the row's weight. FORMULA mixed_kl is both directions of KL, with x
    the weight of the reverse one; adaptive_kl takes that weight from ``rows``.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    rows += row
    label_at = tl.load(label + row)
    label_weight = tl.load(lm_weight + row)
    on_softmax = softmax_weight(rows, lm_weight + row, z_weight + row, num_rows, HAS_Z)
    on_slope = tl.load(kd_weight + row) * scale
    lm_pivot = pivot(tl.load(rows + num_rows * LM_MAX))
    s_pivot = pivot(tl.load(rows + num_rows * STUDENT_MAX))
    t_pivot = pivot(tl.load(rows + num_rows * TEACHER_MAX))
    s_sum, t_sum = tl.load(rows + num_rows * STUDENT_SUM), tl.load(rows + num_rows * TEACHER_SUM)
    mean, reverse_weight = 0.0, x
    if FORMULA == "reverse_kl":
        mean = tl.load(rows + num_rows * FIRST) / s_sum
    elif FORMULA == "mixed_kl" or FORMULA == "adaptive_kl":
        mean = tl.load(rows + num_rows * (FIRST + 1)) / s_sum
    if FORMULA == "adaptive_kl":
        head, tail = tl.load(rows + num_rows * (FIRST + 2)), tl.load(rows + num_rows * (FIRST + 3))
        reverse_weight = tl.where(head + tail == 0.0, 0.5, tail / (head + tail))
    if FORMULA == "logit_mse" or FORMULA == "centred_logit_mse":
        count = tl.load(rows + num_rows * (FIRST + 1))
        if FORMULA == "centred_logit_mse":
            mean = tl.load(rows + num_rows * FIRST) / count
    if FORMULA == "decoupled":
        s_odds = log_odds(rows, num_rows, FIRST + 1, STUDENT_MAX, STUDENT_SUM, inverse_tau_s)
        t_odds = log_odds(rows, num_rows, FIRST + 2, TEACHER_MAX, TEACHER_SUM, inverse_tau_t)
        label_slope = x * (sigmoid(s_odds) - sigmoid(t_odds))
    log_s_sum, log_t_sum = tl.log(s_sum), tl.log(t_sum)
    # a row without mass (a teacher certain of the label, which DKD leaves out) has probability 0 everywhere, not 0 / 0
    one_over_s_sum = tl.where(s_sum == 0.0, 0.0, 1.0 / s_sum)
    one_over_t_sum = tl.where(t_sum == 0.0, 0.0, 1.0 / t_sum)
    for start in range(0, width, BLOCK):
        raw_s = load_logits(student, start, num_valid, width, BLOCK)
        raw_t = load_logits(teacher, start, num_valid, width, BLOCK)
        is_label = start + tl.arange(0, BLOCK) == label_at
        exp_lm = tl.exp(raw_s - lm_pivot)
        gradient = weighted(on_softmax, exp_lm) - tl.where(is_label, label_weight, 0.0)
        s, t = (raw_s - s_pivot) * inverse_tau_s, (raw_t - t_pivot) * inverse_tau_t
        if FORMULA == "logit_mse" or FORMULA == "centred_logit_mse":
            difference = logit_difference(raw_s, raw_t, inverse_tau_s, inverse_tau_t)
            slope = 2.0 / count * possible(raw_s, raw_t, difference - mean)
        elif FORMULA == "decoupled":
            q, p = tl.exp(s) * one_over_s_sum, tl.exp(t) * one_over_t_sum
            slope = tl.where(is_label, label_slope, y * (q - p) - label_slope * q)
        else:
            if TEMPERED:
                q = tl.exp(s) * one_over_s_sum
            else:
                q = exp_lm * one_over_s_sum
            p = tl.exp(t) * one_over_t_sum
            if FORMULA == "forward_kl" or FORMULA == "reverse_kl":
                slope = kl_slope(FORMULA, s, t, p, q, mean, 0.0)
            elif FORMULA == "mixed_kl" or FORMULA == "adaptive_kl":
                slope = kl_slope(FORMULA, s, t, p, q, mean, reverse_weight)
            else:
                _, slope = value_and_slope(FORMULA, t - log_t_sum, s - log_s_sum, p, q, x, y, log_on_p, log_on_q)
                slope -= product(q, tl.load(rows + num_rows * (FIRST + 1)))
        gradient += weighted(on_slope, slope)
        store_gradient(student, start, gradient, num_valid, width, BLOCK)

"""The output head and every loss on it: one sweep over chunks of tokens that makes values and gradients together.

Axes: ``T`` tokens, ``R`` rows (the tokens of one chunk), ``H`` hidden, ``v`` this rank's slice of the vocabulary ``V``.

A chunk's logits are made once, turned into statistics, merged over the group by one all-gather, and overwritten by
their own gradient, from which dHidden and dWeight follow at once. So no ``[T, V]`` tensor exists, and the backward only
multiplies by the incoming gradient and adds dHidden up over the group. The price: how much each token weighs must be
known before the sweep. Formulas and precision are in ``docs/numerics.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megakd.errors import UsageError
from megakd.losses.divergences import DIVERGENCES, teacher_entropy
from megakd.losses.kernels import KDTerm, Kernels
from megakd.losses.native import DTYPES as NATIVE_DTYPES
from megakd.losses.native import NativeKernels
from megakd.losses.reference import ReferenceKernels
from megakd.losses.sweep import TeacherRows, sweep
from megakd.losses.vocab_parallel import RowStatistics, VocabShard
from megakd.targets import DenseTargets

__all__ = ["HeadOutput", "KDTerm", "VocabShard", "head_loss"]

DEFAULT_CHUNK_BYTES = 128 << 20

HiddenGrad = Literal["all_reduce", "partial"]
Implementation = Literal["auto", "reference", "native"]
IMPLEMENTATIONS: dict[str, Kernels] = {"reference": ReferenceKernels(), "native": NativeKernels()}


@dataclass(frozen=True)
class HeadOutput:
    """What the head says about ``T`` tokens. Per-token values are detached, fp32 (fp64 for fp64 inputs), in nats.

    loss: scalar, sum over tokens of lm_weight · lm + kd_weight · kd; differentiable by hidden states and weight.
    lm_T: cross-entropy with the label; 0 where the row was not computed or the label is no vocabulary id.
    kd_T: the divergence, temperature² included; 0 where the row was not computed. None without a teacher, as the rest.
    agree_T: bool, student and teacher have the same top-1 id (one of them, where logits tie).
    entropy_T: the teacher's entropy after its temperature.
    """

    loss: Tensor
    lm_T: Tensor
    kd_T: Tensor | None
    agree_T: Tensor | None
    entropy_T: Tensor | None


def head_loss(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    *,
    shard: VocabShard,
    lm_weight_T: Tensor,
    kd_weight_T: Tensor | None = None,
    kd: KDTerm | None = None,
    targets: DenseTargets | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
    implementation: Implementation = "auto",
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
) -> HeadOutput:
    """LM loss, and distillation loss when ``kd`` is given, of an output head whose vocabulary is split over a group.

    All ranks of ``shard.group`` call this with the same hidden states, labels and weights of tokens. Tokens whose
    weights are all 0 are dropped before any arithmetic: NaN there changes nothing. Without gradients to make
    (``torch.no_grad``, or inputs that ask for none) only values are computed.

    hidden_TH: ``[T, H]`` final hidden states, whole sequence (gathered, under sequence parallelism).
    weight_vH: ``[v, H]`` this rank's rows of the output weight; padding rows must be finite.
    labels_T: ``[T]`` int64 vocabulary ids. Any value where lm_weight_T is 0.
    lm_weight_T, kd_weight_T: ``[T]`` what each token weighs in either term.
    targets: the teacher's hidden states and its head's rows for the same slice of the vocabulary.
    hidden_grad: ``"all_reduce"`` adds dHidden up over the group in the backward; ``"partial"`` leaves this rank's part
        to a caller that reduce-scatters it.
    chunk_bytes: upper bound of the memory for one chunk's logits, student and teacher together.

    Raises UsageError for shapes that do not fit, and, on CPU, for a label with weight that is no vocabulary id. (On
    other devices looking would stall the queue: there such a label makes the loss NaN.)
    """
    _check(hidden_TH, weight_vH, labels_T, shard, lm_weight_T, kd_weight_T, kd, targets)
    wants_hidden = torch.is_grad_enabled() and hidden_TH.requires_grad
    wants_weight = torch.is_grad_enabled() and weight_vH.requires_grad
    with torch.no_grad():
        select = _Select.of(lm_weight_T, kd_weight_T)
        labels_R, lm_weight_R = select(labels_T), select(lm_weight_T)
        _check_labels(labels_R, lm_weight_R, shard.vocab_size)
        teacher = None
        if kd is not None and targets is not None and kd_weight_T is not None:
            teacher = TeacherRows(select(targets.hidden_TH), targets.weight_vH.detach(), select(kd_weight_T), kd)
        swept = sweep(
            select(hidden_TH),
            weight_vH.detach(),
            labels_R,
            lm_weight_R,
            teacher=teacher,
            shard=shard,
            wants_hidden=wants_hidden,
            wants_weight=wants_weight,
            kernels=_kernels(implementation, hidden_TH, targets),
            chunk_bytes=chunk_bytes,
        )
        output = _values(swept.statistics, labels_R, lm_weight_R, teacher, shard.vocab_size, select)
        d_hidden_TH = None if swept.d_hidden_RH is None else select.put(swept.d_hidden_RH)
    if not (wants_hidden or wants_weight):
        return output
    group = shard.group if hidden_grad == "all_reduce" and shard.world_size > 1 else None
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight_vH, output.loss, d_hidden_TH, swept.d_weight_vH, group
    )
    return replace(output, loss=loss)


class _Loss(torch.autograd.Function):
    """A loss whose gradients were made with it: the backward scales them, and adds dHidden up over the group."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_vH: Tensor,
        loss: Tensor,
        d_hidden_TH: Tensor | None,
        d_weight_vH: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(d_hidden_TH, d_weight_vH)
        ctx.weight_dtype = weight_vH.dtype
        ctx.group = group
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_TH, d_weight_vH = ctx.saved_tensors
        if d_hidden_TH is not None:
            d_hidden_TH = d_hidden_TH * grad.to(d_hidden_TH.dtype)
            if ctx.group is not None:
                dist.all_reduce(d_hidden_TH, group=ctx.group)
        if d_weight_vH is not None:
            # The product is rounded to the weight's dtype as it is written: no second wide tensor.
            scaled_vH = torch.empty_like(d_weight_vH, dtype=ctx.weight_dtype)
            d_weight_vH = torch.mul(d_weight_vH, grad.to(d_weight_vH.dtype), out=scaled_vH)
        return d_hidden_TH, d_weight_vH, None, None, None, None


@dataclass(frozen=True)
class _Select:
    """The tokens that carry weight: taken out of ``[T, ...]``, put back among zeros; no copies when all of them do."""

    rows_R: Tensor
    num_tokens: int

    @staticmethod
    def of(lm_weight_T: Tensor, kd_weight_T: Tensor | None) -> _Select:
        keep_T = lm_weight_T != 0
        if kd_weight_T is not None:
            keep_T = keep_T | (kd_weight_T != 0)
        return _Select(keep_T.nonzero().squeeze(1), keep_T.shape[0])

    def __call__(self, values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        return values_T if self.rows_R.shape[0] == self.num_tokens else values_T.index_select(0, self.rows_R)

    def put(self, values_R: Tensor) -> Tensor:
        if self.rows_R.shape[0] == self.num_tokens:
            return values_R
        return values_R.new_zeros(self.num_tokens, *values_R.shape[1:]).index_copy_(0, self.rows_R, values_R)


def _kernels(implementation: Implementation, hidden_TH: Tensor, targets: DenseTargets | None) -> Kernels:
    dtypes = {hidden_TH.dtype} if targets is None else {hidden_TH.dtype, targets.hidden_TH.dtype}
    native = hidden_TH.device.type == "cpu" and dtypes.issubset(NATIVE_DTYPES)
    if implementation == "native" and not native:
        raise UsageError(
            "implementation native needs bf16 or fp32 on cpu, "
            f"got {', '.join(map(str, dtypes))} on {hidden_TH.device}: use auto or reference"
        )
    if implementation == "auto":
        implementation = "native" if native else "reference"
    return IMPLEMENTATIONS[implementation]


def _values(
    rows: RowStatistics,
    labels_R: Tensor,
    lm_weight_R: Tensor,
    teacher: TeacherRows | None,
    vocab_size: int,
    select: _Select,
) -> HeadOutput:
    is_id_R = (labels_R >= 0) & (labels_R < vocab_size)
    # (max - label) first: both are large where logits are, and their difference is exact.
    lm_R = (rows["student_max"] - rows["label"]) + rows["student_sum"].log()
    loss = _weighted_sum(lm_weight_R, torch.where(is_id_R, lm_R, torch.nan))
    lm_T = select.put(torch.where(is_id_R, lm_R, 0.0))
    if teacher is None:
        return HeadOutput(loss, lm_T, None, None, None)
    kd_R = DIVERGENCES[teacher.term.divergence].value(rows) * teacher.term.scale
    return HeadOutput(
        loss=loss + _weighted_sum(teacher.kd_weight_R, kd_R),
        lm_T=lm_T,
        kd_T=select.put(kd_R),
        agree_T=select.put(rows["agree"] > 0),
        entropy_T=select.put(teacher_entropy(rows)),
    )


def _weighted_sum(weight_R: Tensor, value_R: Tensor) -> Tensor:
    """A value that weighs nothing adds nothing, whatever it is."""
    return torch.where(weight_R == 0, 0.0, weight_R.to(value_R.dtype) * value_R).sum()


def _check(
    hidden_TH: Tensor,
    weight_vH: Tensor,
    labels_T: Tensor,
    shard: VocabShard,
    lm_weight_T: Tensor,
    kd_weight_T: Tensor | None,
    kd: KDTerm | None,
    targets: DenseTargets | None,
) -> None:
    num_tokens = hidden_TH.shape[0]
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("hidden_TH", hidden_TH, (num_tokens, weight_vH.shape[-1])),
        ("weight_vH", weight_vH, (shard.num_rows, weight_vH.shape[-1])),
        ("labels_T", labels_T, (num_tokens,)),
        ("lm_weight_T", lm_weight_T, (num_tokens,)),
    ]
    if len({kd is None, targets is None, kd_weight_T is None}) != 1:
        raise UsageError("kd, targets and kd_weight_T go together: give all three, or none for the LM loss alone")
    if targets is not None and kd_weight_T is not None:
        shapes += [
            ("targets.hidden_TH", targets.hidden_TH, (num_tokens, targets.weight_vH.shape[-1])),
            ("targets.weight_vH", targets.weight_vH, (shard.num_rows, targets.weight_vH.shape[-1])),
            ("kd_weight_T", kd_weight_T, (num_tokens,)),
        ]
    for name, tensor, expected in shapes:
        if tuple(tensor.shape) != expected:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def _check_labels(labels_R: Tensor, lm_weight_R: Tensor, vocab_size: int) -> None:
    if labels_R.device.type != "cpu":
        return  # looking would wait for the device
    wrong_R = ((labels_R < 0) | (labels_R >= vocab_size)) & (lm_weight_R != 0)
    if wrong_R.any():
        label = int(labels_R[wrong_R][0])
        raise UsageError(
            f"label {label} carries an LM weight but is no id of the vocabulary of {vocab_size}: "
            "was the data preprocessed with another tokenizer?"
        )

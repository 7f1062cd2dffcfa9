"""One step: microbatches through megatron's schedule, each loss made from hidden states and the teacher's targets.

Axes: B microbatch, S sequence (this rank's part under context parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.loader import Microbatch, StepBatch
from megakd.losses.head import HeadOutput
from megakd.model.attention import slice_sequence
from megakd.model.teacher import Teacher
from megakd.parallel import Groups
from megakd.targets import Targets
from megakd.train.objective import Objective
from megakd.train.optim import NonFiniteError, Student

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class StepLoss:
    """Means over the tokens of the whole global batch, in nats; the same on every rank.

    loss: what was optimised. kd, agreement (share of tokens with the teacher's top-1) and teacher_entropy are None
    without a teacher. num_tokens: tokens that the loss mask kept.
    """

    loss: float
    lm: float
    kd: float | None
    agreement: float | None
    teacher_entropy: float | None
    num_tokens: int


def run_step(
    student: Student,
    batch: StepBatch,
    teacher: Teacher,
    objective: Objective,
    groups: Groups,
    *,
    step: int,
    forward_only: bool = False,
) -> StepLoss:
    """Forward and backward over all microbatches of this rank; gradients end up as the mean over the global batch.

    Raises:
        NonFiniteError: on every rank, if a loss anywhere is not finite; the rank that saw it names the samples.
    """
    targets = teacher.targets(batch)
    chunks = student.wrapped
    micro_batch_size, seq_length = batch.microbatch(0).tokens_BS.shape
    run_schedule = get_forward_backward_func()
    non_finite: list[str] = []
    sums = run_schedule(
        forward_step_func=_forward_step(student, targets, objective, groups, non_finite),
        data_iterator=[iter(batch) for _ in chunks] if len(chunks) > 1 else iter(batch),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=batch.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total = _sum_over_batch(sums, groups)
    if not torch.isfinite(total).all():
        _raise_non_finite(non_finite, step)
    return _means(total, with_teacher=objective.term is not None)


def _forward_step(
    student: Student, targets: Iterator[Targets | None], objective: Objective, groups: Groups, non_finite: list[str]
) -> Callable[..., tuple[Tensor, LossFunction]]:
    """What megatron's schedule calls for each microbatch and model chunk: the output, and the loss on it."""

    def forward_step(microbatches: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, LossFunction]:
        microbatch = next(microbatches)
        tokens_BS = to_device(microbatch.tokens_BS, groups)
        output = chunk(tokens_BS, None, None)

        def loss_function(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            labels_SB = to_device(microbatch.labels_BS, groups).t().contiguous()
            mask_SB = to_device(microbatch.loss_mask_BS, groups).t().contiguous()
            weight_vH = student.output_weight(chunk)
            result = objective(hidden_SBH, weight_vH, labels_SB, mask_SB, next(targets))
            sums = _sums(result, mask_SB)
            if not torch.isfinite(result.loss):
                non_finite.extend(_non_finite_samples(result, mask_SB, microbatch))
            # three values: with two, megatron multiplies by the context parallel size (schedules.py:268). It may scale
            # the loss in place, so what is logged is a tensor of its own.
            return result.loss, mask_SB.sum().to(torch.int), sums

        return output, loss_function

    return forward_step


def to_device(array: np.ndarray[Any, Any], groups: Groups) -> Tensor:
    """A ``[B, S]`` array as a tensor on this rank's device: this rank's part of the sequence."""
    whole = torch.from_numpy(array).to(groups.device, non_blocking=True)
    return slice_sequence(whole, dim=1, rank=groups.context_rank, size=groups.parallel.context_parallel_size)


def _sums(result: HeadOutput, mask_SB: Tensor) -> Tensor:
    """Sums over this microbatch: tokens, loss, LM, KD, agreement, teacher entropy. float64."""
    zero = torch.zeros((), dtype=torch.float64, device=mask_SB.device)
    parts = [mask_SB.sum(), result.loss.detach(), result.lm_T.double().sum()]
    for values_T in (result.kd_T, result.agree_T, result.entropy_T):
        parts.append(zero if values_T is None else values_T.double().sum())
    return torch.stack([part.double() for part in parts])


def _sum_over_batch(sums: list[Tensor], groups: Groups) -> Tensor:
    """The sums of all microbatches of all ranks, on every rank."""
    total = torch.zeros(6, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        total = torch.stack(list(sums)).sum(0)
        dist.all_reduce(total, group=groups.collection.dp_cp)
    pipeline = groups.collection.pp
    if pipeline.size() > 1:
        dist.broadcast(total, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return total


def _means(total: Tensor, *, with_teacher: bool) -> StepLoss:
    tokens, loss, lm, kd, agree, entropy = total.tolist()
    count = max(tokens, 1.0)
    return StepLoss(
        loss=loss / count,
        lm=lm / count,
        kd=kd / count if with_teacher else None,
        agreement=agree / count if with_teacher else None,
        teacher_entropy=entropy / count if with_teacher else None,
        num_tokens=int(tokens),
    )


def _non_finite_samples(result: HeadOutput, mask_SB: Tensor, microbatch: Microbatch) -> list[str]:
    bad_T = ~torch.isfinite(result.lm_T)
    if result.kd_T is not None:
        bad_T |= ~torch.isfinite(result.kd_T)
    bad_B = (bad_T.reshape(mask_SB.shape) & mask_SB).any(0).cpu().numpy()
    return [
        f"dataset {dataset} sample {sample}"
        for dataset, sample in zip(microbatch.dataset_ids_B[bad_B], microbatch.sample_ids_B[bad_B])
    ]


def _raise_non_finite(samples: list[str], step: int) -> None:
    """Every rank gets here together, so all can say what any of them saw."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, samples)
    seen = "; ".join(f"rank {rank}: {', '.join(found[:8])}" for rank, found in enumerate(gathered) if found)
    raise NonFiniteError(
        f"step {step}: the loss is not finite ({seen or 'in the sum alone'}); the step was not applied"
    )

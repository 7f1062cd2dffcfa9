"""One step: microbatches through megatron's schedule, each loss made from hidden states and the teacher's targets.

Axes: B microbatch, S sequence (this rank's part under context parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.loader import Microbatch, StepBatch
from megakd.errors import NonFiniteError
from megakd.model.attention import slice_sequence
from megakd.parallel import Groups
from megakd.targets import Given, Unreadable
from megakd.teachers.protocol import Teacher
from megakd.train.journal import Keep
from megakd.train.objective.calibration import NUM_BINS
from megakd.train.objective.objective import Objective, TokenLosses
from megakd.train.optim import Student

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


# What is added up over the microbatches and ranks of a step: counts of tokens, then sums over them.
_COUNTS = ("all", "modelled", "mask", "kept", "known", "kd_tokens", "entropy_tokens", "stored")
_SUMS = (*_COUNTS, "loss", "lm", "z", "kd", "agreement", "entropy", "temperature")
_NUM_SUMS = len(_SUMS) + 2 * NUM_BINS  # and those of the calibration, which training leaves at 0


@dataclass(frozen=True)
class StepLoss:
    """Means over the whole global batch, in nats; the same on every rank.

    loss: what was optimised, a mean over ``num_tokens``, the tokens that are trained on. lm and z_loss (log-sum-exp of
    the student's logits, squared; None if it weighs nothing): over those of them that were computed. kd, agreement
    (share of tokens where student and target have one top-1) and teacher_entropy (of the target, after its
    temperature): over the ``num_kd_tokens`` tokens with KD; None without. kd_share: those among all that the loss mask
    keeps, where a gate may leave some out. stored_share: the same of tokens whose targets come from a store. taid_t:
    the teacher's weight in taid's target. alpha, lm_weight, temperature (a mean, where each token has its own; None
    where alpha is 0): of this step; None without a teacher. modelled_share: of all tokens, masked ones too, those of
    microbatches for which a model ran as teacher. calibration: sums of an evaluation, see
    ``calibration.calibration_sums``, on the host; they are no means.
    """

    loss: float
    lm: float
    kd: float | None
    agreement: float | None
    teacher_entropy: float | None
    num_tokens: int
    z_loss: float | None = None
    kd_share: float | None = None
    stored_share: float | None = None
    num_kd_tokens: int = 0
    taid_t: float | None = None
    alpha: float | None = None
    lm_weight: float | None = None
    temperature: float | None = None
    modelled_share: float = 0.0
    calibration: Tensor | None = None


def run_step(
    student: Student,
    batch: StepBatch,
    teacher: Teacher,
    objective: Objective,
    groups: Groups,
    *,
    step: int,
    forward_only: bool = False,
    keep: Keep | None = None,
) -> StepLoss:
    """Forward and backward over all microbatches of this rank; gradients end up as the mean over the global batch.

    teacher, objective: of this step, so that a teacher whose targets no term reads has been left out already.
    keep: takes what the student says about each microbatch, as long as its weights are those of this step.

    Raises:
        NonFiniteError: on every rank, if a loss anywhere is not finite; the rank that saw it names the samples.
        MismatchError, CorruptError: on every rank, if a store could not be read on one.
    """
    targets = teacher.targets(batch)
    chunks = student.wrapped
    micro_batch_size, seq_length = batch.microbatch(0).tokens_BS.shape
    run_schedule = get_forward_backward_func()
    found = _Found()
    sums = run_schedule(
        forward_step_func=_forward_step(student, targets, objective, groups, found, keep),
        data_iterator=[iter(batch) for _ in chunks] if len(chunks) > 1 else iter(batch),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=batch.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total = _sum_over_batch(sums, groups)
    if not torch.isfinite(total).all():
        _refuse(found, step, "the evaluation has no result" if forward_only else "the step was not applied")
    calibration = total[len(_SUMS) :].reshape(2, NUM_BINS).cpu() if objective.calibrate else None
    return _means(dict(zip(_SUMS, total.tolist())), objective, calibration)


@dataclass
class _Found:
    """What this rank met that refuses the step: samples with a loss that is not finite, targets it could not read."""

    samples: list[str] = field(default_factory=list)
    unreadable: Exception | None = None


def _forward_step(
    student: Student,
    targets: Iterator[Given | Unreadable],
    objective: Objective,
    groups: Groups,
    found: _Found,
    keep: Keep | None,
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
            given = next(targets)
            if isinstance(given, Unreadable):  # go on: the other ranks wait in this step's messages
                found.unreadable, given = given.error, None
            result = objective(hidden_SBH, weight_vH, labels_SB, mask_SB, given)
            if keep is not None:
                keep(hidden_SBH, weight_vH, microbatch)
            sums = _sums(result)
            if found.unreadable is not None:
                sums.fill_(torch.nan)  # so every rank gets to hear of it
            elif not torch.isfinite(sums).all():
                found.samples.extend(_non_finite_samples(result, mask_SB, microbatch))
            # three values: with two, megatron multiplies by the context parallel size (schedules.py:268). It may scale
            # the loss in place, so what is logged is a tensor of its own.
            return result.loss, result.kept_T.sum().to(torch.int), sums

        return output, loss_function

    return forward_step


def to_device(array: np.ndarray[Any, Any], groups: Groups) -> Tensor:
    """A ``[B, S]`` array as a tensor on this rank's device: this rank's part of the sequence."""
    whole = torch.from_numpy(array).to(groups.device, non_blocking=True)
    return slice_sequence(whole, dim=1, rank=groups.context_rank, size=groups.parallel.context_parallel_size)


def _sums(result: TokenLosses) -> Tensor:
    """``[_NUM_SUMS]`` float64: ``_SUMS`` of this microbatch, and those of its calibration."""
    head, known_T, kd_T = result.head, result.known_T, result.kd_T
    sums = {"mask": result.mask_T.sum(), "kept": result.kept_T.sum(), "known": known_T.sum(), "kd_tokens": kd_T.sum()}
    sums |= {"stored": result.stored_T.sum(), "all": known_T.new_tensor(known_T.numel(), dtype=torch.float64)}
    sums["modelled"] = sums["all"] * result.asked_model
    sums |= {"loss": result.loss.detach(), "lm": _sum(head.lm_T, known_T), "z": _sum(head.log_z_T.square(), known_T)}
    if result.kd is not None:
        sums |= {"kd": _sum(result.kd.value_T, kd_T), "agreement": _sum(result.kd.agree_T, kd_T)}
        if result.kd.entropy_T is not None:
            sums |= {"entropy": _sum(result.kd.entropy_T, kd_T), "entropy_tokens": kd_T.sum()}
    if result.temperature_T is not None:
        sums["temperature"] = _sum(result.temperature_T, kd_T)
    zero = torch.zeros((), dtype=torch.float64, device=known_T.device)
    calibration = zero.expand(2, NUM_BINS) if result.calibration is None else result.calibration
    return torch.cat([torch.stack([sums.get(name, zero).double() for name in _SUMS]), calibration.flatten()])


def _sum(values_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.where(mask_T, values_T, 0).double().sum()


def _sum_over_batch(sums: list[Tensor], groups: Groups) -> Tensor:
    """The sums of all microbatches of all ranks, on every rank."""
    total = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        total = torch.stack(list(sums)).sum(0)
        dist.all_reduce(total, group=groups.collection.dp_cp)
    pipeline = groups.collection.pp
    if pipeline.size() > 1:
        dist.broadcast(total, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return total


def _means(total: dict[str, float], objective: Objective, calibration: Tensor | None) -> StepLoss:
    def mean(name: str, count: str) -> float:
        return total[name] / max(total[count], 1.0)

    term, with_kd = objective.term, objective.term is not None and total["kd_tokens"] > 0
    per_token = objective.token_temperature is not None
    return StepLoss(
        loss=mean("loss", "kept"),
        lm=mean("lm", "known"),
        kd=mean("kd", "kd_tokens") if with_kd else None,
        agreement=mean("agreement", "kd_tokens") if with_kd else None,
        teacher_entropy=mean("entropy", "entropy_tokens") if total["entropy_tokens"] else None,
        num_tokens=int(total["kept"]),
        z_loss=mean("z", "known") if objective.z_loss_coeff > 0 else None,
        kd_share=mean("kd_tokens", "mask") if term is not None and objective.gates.closed else None,
        stored_share=mean("stored", "mask") if term is not None and objective.from_store else None,
        num_kd_tokens=int(total["kd_tokens"]),
        taid_t=None if objective.taid is None else objective.taid.t,
        alpha=None if objective.schedule is None else objective.alpha,
        lm_weight=None if objective.schedule is None else objective.lm_share,
        temperature=None if term is None else mean("temperature", "kd_tokens") if per_token else term.temperature,
        modelled_share=mean("modelled", "all"),
        calibration=calibration,
    )


def _non_finite_samples(result: TokenLosses, mask_SB: Tensor, microbatch: Microbatch) -> list[str]:
    bad_T = result.known_T & ~torch.isfinite(result.head.lm_T + result.head.log_z_T)
    if result.kd is not None:
        bad_T = bad_T | (result.kd_T & ~torch.isfinite(result.kd.value_T))
    bad_B = bad_T.reshape(mask_SB.shape).any(0).cpu().numpy()
    return [
        f"dataset {dataset} sample {sample}"
        for dataset, sample in zip(microbatch.dataset_ids_B[bad_B], microbatch.sample_ids_B[bad_B])
    ]


def _refuse(found: _Found, step: int, outcome: str) -> NoReturn:
    """Every rank gets here together, so all can say what any of them saw."""
    gathered = [_Found() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    for rank, one in enumerate(gathered):
        if one.unreadable is not None:
            raise type(one.unreadable)(f"step {step}, rank {rank}: {one.unreadable}; {outcome}")
    seen = "; ".join(f"rank {rank}: {', '.join(one.samples[:8])}" for rank, one in enumerate(gathered) if one.samples)
    raise NonFiniteError(f"step {step}: the loss is not finite ({seen or 'in the sum alone'}); {outcome}")

"""One step: microbatches go through megatron's schedule; losses come from hidden states and the teacher's targets.

Axes: B microbatch, S sequence (this rank's part under context parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.loader import Microbatch, StepBatch
from megakd.errors import NonFiniteError
from megakd.losses.calibration import NUM_BINS
from megakd.model.attention import slice_sequence
from megakd.parallel import Groups
from megakd.targets import Given, Unreadable
from megakd.teachers.protocol import Teacher
from megakd.train.journal import Keep
from megakd.train.objective.objective import Objective, TokenLosses
from megakd.train.optim import Student

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
_Suspects = tuple[NDArray[np.int64], NDArray[np.int64], Tensor]


# Quantities added up over the microbatches and ranks of a step: counts of tokens, then sums over them.
_COUNTS = ("all", "modelled", "mask", "kept", "known", "kd_tokens", "entropy_tokens", "stored")
_SUMS = (*_COUNTS, "loss", "lm", "z", "kd", "agreement", "entropy", "temperature")
_NUM_SUMS = len(_SUMS) + 2 * NUM_BINS  # and the sums of the calibration, which training leaves at 0


@dataclass(frozen=True)
class StepLoss:
    """Means over the whole global batch, in nats; equal on all ranks.

    loss: the optimised loss, a mean over ``num_tokens``, the tokens that are trained on. lm, z_loss (squared
    log-sum-exp of the student's logits; None if its weight is 0): means over those of them whose loss was computed.
    kd, agreement (share of tokens where student and target have one top-1), teacher_entropy (of the target, after its
    temperature): means over the ``num_kd_tokens`` tokens with KD; None if there are none. kd_share: share of tokens
    with KD among those that the loss mask keeps; None unless a gate may leave tokens out. stored_share: share of tokens
    with stored targets among those; None if no store is read. taid_t: the teacher's weight in taid's target. alpha,
    lm_weight, temperature: those of this step, None without a teacher; the temperature is a mean if each token has its
    own, and None if alpha is 0. modelled_share: share, among all tokens with the masked ones, of those in microbatches
    for which a model ran as teacher. calibration: sums (not means) of an evaluation, on the host; see
    ``calibration.calibration_sums``.
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
    """Run forward and backward over all microbatches of this rank; gradients become the mean over the global batch.

    teacher, objective: those of this step; a teacher whose targets no term reads must have been left out already.
    keep: takes the student's hidden states of each microbatch, before the weights are updated.

    Raises:
        NonFiniteError: on every rank, if a loss anywhere is not finite; the rank that saw it names the samples.
        MismatchError, CorruptError: on every rank, if a store could not be read on one.
    """
    targets = teacher.targets(batch)
    chunks = student.wrapped
    micro_batch_size, seq_length = batch.microbatch(0).tokens_BS.shape
    run_schedule = get_forward_backward_func()
    problems = _Problems()
    sums = run_schedule(
        forward_step_func=_forward_step(student, targets, objective, groups, problems, keep),
        data_iterator=[iter(batch) for _ in chunks] if len(chunks) > 1 else iter(batch),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=batch.num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total = _sum_over_batch(sums, groups).cpu()  # waits for the device, once a step
    if not torch.isfinite(total).all():
        _refuse(problems, step, "the evaluation has no result" if forward_only else "the step was not applied")
    calibration = total[len(_SUMS) :].reshape(2, NUM_BINS) if objective.calibrate else None
    return _means(dict(zip(_SUMS, total.tolist())), objective, calibration)


@dataclass
class _Problems:
    """Reasons on this rank to refuse the step: samples with a loss that is not finite, targets that cannot be read.

    samples: names, read from ``suspects`` when the step is refused. suspects: each microbatch's ids of datasets and
    samples, with bool ``[B]`` on the device, True for a loss that is not finite: to read it earlier would wait for it.
    """

    samples: list[str] = field(default_factory=list)
    unreadable: Exception | None = None
    suspects: list[_Suspects] = field(default_factory=list)


def _forward_step(
    student: Student,
    targets: Iterator[Given | Unreadable],
    objective: Objective,
    groups: Groups,
    problems: _Problems,
    keep: Keep | None,
) -> Callable[..., tuple[Tensor, LossFunction]]:
    """Return the function that megatron's schedule calls for each microbatch and model chunk.

    It returns the chunk's output and the loss as a function of it. problems: takes the reasons to refuse the step.
    """

    def forward_step(microbatches: Iterator[Microbatch], chunk: Any) -> tuple[Tensor, LossFunction]:
        microbatch = next(microbatches)
        tokens_BS = to_device(microbatch.tokens_BS, groups)
        output = chunk(tokens_BS, None, None)

        def loss_function(hidden_SBH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            labels_SB = to_device(microbatch.labels_BS, groups).t().contiguous()
            mask_SB = to_device(microbatch.loss_mask_BS, groups).t().contiguous()
            weight_vH = student.output_weight(chunk)
            own_targets = next(targets)
            if isinstance(own_targets, Unreadable):  # go on: the other ranks wait in this step's messages
                problems.unreadable, own_targets = own_targets.error, None
            whole = bool(microbatch.loss_mask_BS.all())  # on the host: the device is not asked
            result = objective(hidden_SBH, weight_vH, labels_SB, mask_SB, own_targets, whole=whole)
            if keep is not None:
                keep(hidden_SBH, weight_vH, microbatch)
            sums = _sums(result)
            if problems.unreadable is not None:
                sums.fill_(torch.nan)  # which tells every rank
            else:
                bad_B = _not_finite(result, mask_SB)
                problems.suspects.append((microbatch.dataset_ids_B, microbatch.sample_ids_B, bad_B))
            # three values: with two, megatron multiplies by the context parallel size (schedules.py:268). It may scale
            # the loss in place, so the logged sums are a tensor of their own.
            return result.loss, result.kept_T.sum().to(torch.int), sums

        return output, loss_function

    return forward_step


def to_device(array: np.ndarray[Any, Any], groups: Groups) -> Tensor:
    """Return this rank's part of the sequence of a ``[B, S]`` array, as a tensor on its device."""
    whole = torch.from_numpy(array).to(groups.device, non_blocking=True)
    return slice_sequence(whole, dim=1, rank=groups.context_rank, size=groups.parallel.context_parallel_size)


def _sums(result: TokenLosses) -> Tensor:
    """Return float64 ``[_NUM_SUMS]``: the ``_SUMS`` of this microbatch, and the sums of its calibration."""
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
    """Return the sums over all microbatches of all ranks, on every rank."""
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


def _not_finite(result: TokenLosses, mask_SB: Tensor) -> Tensor:
    """Return bool ``[B]``, True for a sample with a loss that is not finite."""
    bad_T = result.known_T & ~torch.isfinite(result.head.lm_T + result.head.log_z_T)
    if result.kd is not None:
        bad_T = bad_T | (result.kd_T & ~torch.isfinite(result.kd.value_T))
    return bad_T.reshape(mask_SB.shape).any(0)


def _names(suspects: list[_Suspects]) -> list[str]:
    return [
        f"dataset {dataset} sample {sample}"
        for datasets_B, samples_B, bad_B in suspects
        for dataset, sample, bad in zip(datasets_B, samples_B, bad_B.tolist())
        if bad
    ]


def _refuse(problems: _Problems, step: int, outcome: str) -> NoReturn:
    """Raise the error of a refused step. Every rank calls it, so that each can name what any of them met."""
    gathered = [_Problems() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, _Problems(_names(problems.suspects), problems.unreadable))
    for rank, met in enumerate(gathered):
        if met.unreadable is not None:
            raise type(met.unreadable)(f"step {step}, rank {rank}: {met.unreadable}; {outcome}")
    seen = "; ".join(f"rank {rank}: {', '.join(met.samples[:8])}" for rank, met in enumerate(gathered) if met.samples)
    raise NonFiniteError(f"step {step}: the loss is not finite ({seen or 'in the sum alone'}); {outcome}")

"""Figures on held-out data: loss, calibration, and the comparison with a teacher, a mean over tokens.

Axes: ``S`` sequence, ``B`` microbatch, ``T`` = S x B tokens, sequence first, ``R`` the tokens that the mask keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megakd.data.loader import Loader, Microbatch
from megakd.data.samples.label_bytes import BYTES_OF, label_bytes, why_no_bytes
from megakd.data.samples.protocol import Samples
from megakd.errors import CorruptError
from megakd.losses.calibration import NUM_BINS, calibration_error, calibration_sums_of
from megakd.losses.head import KD, KDTerm, head_loss
from megakd.losses.read import HeadReading, read_head
from megakd.parallel import Groups
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.models import Models
from megakd.pipeline.evaluate.preflight import EvaluatePlan
from megakd.pipeline.frozen.model import FrozenModel
from megakd.targets import DenseTargets
from megakd.work.console import tell
from megakd.work.progress import RequestProgress

_SUMS = ("tokens", "lm", "kl", "agreement", "entropy", "teacher_lm", "bytes")
_NUM_SUMS = len(_SUMS) + 2 * NUM_BINS


@dataclass(frozen=True)
class Figures:
    """Means over held-out tokens, in nats.

    lm_loss: cross-entropy of the labels. perplexity: its exponential. bits_per_byte: that loss summed over tokens, in
    bits, over the UTF-8 bytes of the original text that they stand for (``label_bytes``), which compares models of
    different tokenizers; None where a dataset does not record its bytes. accuracy: share of tokens whose label is the
    model's best id. calibration_error: see ``losses.calibration``. teacher: None without one; kl_divergence of the
    model from it, the teacher's entropy, agreement (share of tokens where both have one best id), and the teacher's own
    loss on the same tokens.
    """

    num_samples: int
    num_tokens: int
    lm_loss: float
    perplexity: float
    accuracy: float
    calibration_error: float
    bits_per_byte: float | None = None
    num_bytes: int | None = None
    teacher: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures that are known, by name."""
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class HeldOutFigures:
    """Figures on all held-out data and on each of its datasets.

    data: the data in words of training's own evaluation; two evaluations are comparable if theirs are equal.
    """

    all: Figures
    datasets: dict[str, Figures]
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        parts = {name: figures.as_dict() for name, figures in self.datasets.items()}
        return {**self.all.as_dict(), "data": self.data, **({"datasets": parts} if len(parts) > 1 else {})}


@torch.no_grad()
def measure_held_out(config: EvaluateConfig, plan: EvaluatePlan, models: Models, groups: Groups) -> HeldOutFigures:
    """Measure the model on the held-out data. All ranks call it, and get the same figures.

    Raises CorruptError, on every rank, for a loss that is not finite.
    """
    blend = plan.blend
    assert blend is not None
    ids = _samples_of_each(plan, config.eval_samples)
    missing = why_no_bytes(blend.datasets)
    if missing is not None and groups.rank == 0:
        tell(f"no bits per byte: {missing}")
    progress = RequestProgress(
        sum(map(len, ids)),
        sum(int(samples.lengths(own_ids).sum()) for samples, own_ids in zip(blend.datasets, ids)),
        interval=config.log_interval,
        what="held-out samples",
        says=groups.rank == 0,
        copies=groups.data_size,
    )
    sums = [
        _over_ranks(
            _measure(config, plan, models, groups, samples, ids[index], progress, counts_bytes=missing is None), groups
        )
        for index, samples in enumerate(blend.datasets)
    ]
    names = [Path(samples.dataset.prefix).name for samples in blend.datasets]
    by_dataset = {}
    for index, (name, values) in enumerate(zip(names, sums)):
        if not len(ids[index]):
            continue
        if not bool(torch.isfinite(values).all()):
            raise CorruptError(
                f"{plan.model.record.path}: the loss on {blend.datasets[index].dataset.prefix} is not finite: the "
                "weights are broken, or the precision (--bf16, --fp8-format) does not hold them"
            )
        label = name if names.count(name) == 1 else blend.datasets[index].dataset.prefix
        by_dataset[str(label)] = _figures(values, len(ids[index]), with_teacher=models.teacher is not None)
    total = torch.stack(sums).sum(0)
    whole = _figures(total, sum(map(len, ids)), with_teacher=models.teacher is not None)
    return HeldOutFigures(whole, by_dataset, _describe(config, plan, whole))


def _samples_of_each(plan: EvaluatePlan, count: int | None) -> list[NDArray[np.int64]]:
    """Sample ids of each dataset: every one once, or the first ``count`` draws of training's own evaluation."""
    assert plan.blend is not None
    datasets = plan.blend.datasets
    if count is None and plan.blend.given_weights is None:
        return [np.arange(samples.num_samples) for samples in datasets]
    if count is None:
        count = sum(samples.num_samples for samples in datasets)
    draws = plan.blend.draw(np.arange(count))
    return [np.sort(draws.sample_id[draws.dataset_index == index]) for index in range(len(datasets))]


def _measure(
    config: EvaluateConfig,
    plan: EvaluatePlan,
    models: Models,
    groups: Groups,
    samples: Samples,
    ids: NDArray[np.int64],
    progress: RequestProgress,
    *,
    counts_bytes: bool,
) -> Tensor:
    """Return float64 ``[_NUM_SUMS]``: sums over this copy's share of the samples; 0 on ranks before the last stage."""
    frozen = FrozenModel(
        samples,
        models.model,
        groups.parallel,
        micro_batch_size=config.micro_batch_size,
        vocab_size=plan.model.record.vocab_size,
        eod_mask_loss=config.eod_mask_loss,
        eod_token=plan.eod_token,
    )
    mine = ids[groups.data_rank :: groups.data_size]
    sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=groups.device)
    for batch in frozen.batches(mine, frozen.stretches(mine)):
        outputs = models.model.targets(batch)
        answers = None if models.teacher is None else models.teacher.targets(batch)
        for microbatch, own in zip(batch, outputs):
            teacher = None if answers is None else next(answers)
            assert isinstance(own, DenseTargets)
            sums += _sums(config, models, groups, microbatch, own, teacher)
            if counts_bytes:
                sums[_SUMS.index("bytes")] += label_bytes(samples, microbatch.sample_ids_B, microbatch.loss_mask_BS)
        progress.add(
            count=sum(len(part.places) for part in batch.stretches),
            tokens=sum(int(part.lengths.sum()) for part in batch.stretches),
        )
    return sums


def _sums(
    config: EvaluateConfig,
    models: Models,
    groups: Groups,
    microbatch: Microbatch,
    own: DenseTargets,
    teacher: DenseTargets | None,
) -> Tensor:
    mask_T = torch.from_numpy(microbatch.loss_mask_BS.T.reshape(-1)).to(groups.device)
    labels_R = torch.from_numpy(microbatch.labels_BS.T.reshape(-1)).to(groups.device)[mask_T]
    hidden_RH = own.hidden_TH[mask_T]
    reading = _read(config, models, DenseTargets(hidden_RH, own.weight_vH), labels_R, top_k=1)
    assert reading.log_prob_T is not None
    sums = {"tokens": mask_T.sum(), "lm": -reading.log_prob_T.double().sum()}
    if teacher is not None:
        teacher_R = DenseTargets(teacher.hidden_TH[mask_T], teacher.weight_vH)
        every_R = torch.ones(len(labels_R), device=groups.device)
        output = head_loss(
            hidden_RH,
            own.weight_vH,
            labels_R,
            shard=models.shard,
            lm_weight_T=every_R,
            kd=[KD(KDTerm("forward_kl"), teacher_R, every_R)],
            implementation=config.loss_implementation,
            chunk_bytes=config.head_chunk_mbytes << 20,
        )
        (kd,) = output.kd
        its_own = _read(config, models, teacher_R, labels_R)
        assert kd.entropy_T is not None and its_own.log_prob_T is not None
        sums |= {"kl": kd.value_T.double().sum(), "agreement": kd.agree_T.sum(), "entropy": kd.entropy_T.double().sum()}
        sums["teacher_lm"] = -its_own.log_prob_T.double().sum()
    zero = torch.zeros((), dtype=torch.float64, device=groups.device)
    named = torch.stack([sums.get(name, zero).double() for name in _SUMS])
    return torch.cat([named, calibration_sums_of(reading, labels_R).flatten()])


def _read(
    config: EvaluateConfig, models: Models, targets: DenseTargets, labels_R: Tensor, *, top_k: int = 0
) -> HeadReading:
    return read_head(
        targets.hidden_TH,
        targets.weight_vH,
        shard=models.shard,
        ids_T=labels_R,
        top_k=top_k,
        implementation=config.loss_implementation,
        chunk_bytes=config.head_chunk_mbytes << 20,
    )


def _over_ranks(sums: Tensor, groups: Groups) -> Tensor:
    """Return the sums over all copies of the model, on every rank."""
    if groups.is_last_stage:
        dist.all_reduce(sums, group=groups.collection.dp_cp)
    pipeline = groups.collection.pp
    if pipeline.size() > 1:
        dist.broadcast(sums, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return sums.cpu()


def _figures(sums: Tensor, num_samples: int, *, with_teacher: bool) -> Figures:
    total = dict(zip(_SUMS, sums.tolist()))
    bins = sums[len(_SUMS) :].reshape(2, NUM_BINS)
    count = int(total["tokens"])
    error = calibration_error(bins, count)  # refuses data of which the mask keeps nothing
    lm_loss = total["lm"] / count
    teacher = None
    if with_teacher:
        its_loss = total["teacher_lm"] / count
        teacher = {
            "kl_divergence": total["kl"] / count,
            "agreement": total["agreement"] / count,
            "teacher_entropy": total["entropy"] / count,
            "teacher_lm_loss": its_loss,
            "teacher_perplexity": _perplexity(its_loss),
        }
    num_bytes = int(total["bytes"])
    return Figures(
        num_samples=num_samples,
        num_tokens=count,
        lm_loss=lm_loss,
        perplexity=_perplexity(lm_loss),
        accuracy=float(bins[0].sum()) / count,
        calibration_error=error,
        bits_per_byte=total["lm"] / math.log(2) / num_bytes if num_bytes else None,
        num_bytes=num_bytes or None,
        teacher=teacher,
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^709 is the largest double


def _describe(config: EvaluateConfig, plan: EvaluatePlan, whole: Figures) -> dict[str, Any]:
    """Describe the data as training's own evaluation does, with the datasets' names and whether samples were drawn."""
    assert plan.blend is not None
    order = Loader(plan.blend, seq_length=plan.seq_length, micro_batch_size=1, global_batch_size=1, vocab_size=None)
    return {
        "fingerprint": order.order_fingerprint(),
        "num_samples": whole.num_samples,
        "num_tokens": whole.num_tokens,
        **({"num_bytes": whole.num_bytes, "bytes_of": BYTES_OF} if whole.num_bytes else {}),
        "tokenizer": (plan.tokenizer_record or {}).get("hash"),
        "every_sample_once": config.eval_samples is None and plan.blend.given_weights is None,
        "packing": config.packing,
        "seq_length": plan.seq_length,
        "eod_mask_loss": config.eod_mask_loss,
        "datasets": {str(samples.dataset.prefix): samples.dataset.fingerprint for samples in plan.blend.datasets},
    }

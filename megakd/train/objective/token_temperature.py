"""A temperature for each token, from the teacher's logits: NormKD's, and one that follows the entropy.

Axes: T flattened tokens of one microbatch, H hidden of the teacher, v this rank's slice of the vocabulary V.

Only the teacher's logits are tempered. They are a product of its hidden states with its head, so dividing a token's
hidden states divides its logits, and the sweep, which has one temperature for each term, uses 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.errors import UsageError
from megakd.losses.read import read_head
from megakd.losses.vocab_parallel import VocabShard
from megakd.targets import DenseTargets, Given

SMALLEST, LARGEST = 1e-3, 1e3
_ROWS = 16384  # rows of the head that are converted to fp32 at once


@dataclass(frozen=True)
class Tempered:
    """Targets whose logits have been divided by ``temperature_T``, fp32 ``[T]``."""

    targets: DenseTargets
    temperature_T: Tensor


class TokenTemperature:
    """Division of every token's teacher logits t by a temperature of its own, kept within 0.001 and 1000.

    logit_std: c · std(t), over the whole vocabulary: NormKD's for the teacher. entropy: c + (uncertain - c) · H / log V
    with H the entropy of softmax(t); ours, as no published formula of AdaKD's was at hand. c: ``--kd-temperature``.
    """

    def __init__(
        self, mode: Literal["logit_std", "entropy"], *, uncertain: float, shard: VocabShard, chunk_bytes: int
    ) -> None:
        self._mode, self._uncertain, self._shard, self._chunk_bytes = mode, uncertain, shard, chunk_bytes
        self._head: Tensor | None = None
        self._covariance_HH: Tensor | None = None

    @torch.no_grad()
    def __call__(self, targets: Given, temperature: float) -> Tempered:
        """Return the targets with divided logits; all ranks of the vocabulary's group call it.

        temperature: c. Raises UsageError for sparse targets.
        """
        if not isinstance(targets, DenseTargets):
            raise UsageError(
                f"--kd-temperature-mode {self._mode} needs every logit of the teacher, and these targets list some: "
                "train with a model as teacher (--teacher-load), or with --kd-temperature-mode static"
            )
        wide_TH = targets.hidden_TH.to(torch.promote_types(targets.hidden_TH.dtype, torch.float32))
        if self._mode == "logit_std":
            temperature_T = temperature * self._logit_std(wide_TH, targets.weight_vH)
        else:
            share_T = self._entropy(targets) / math.log(self._shard.vocab_size)
            temperature_T = temperature + (self._uncertain - temperature) * share_T
        temperature_T = temperature_T.clamp(SMALLEST, LARGEST)  # NaN stays: the step is refused for it
        hidden_TH = (wide_TH / temperature_T[:, None]).to(targets.hidden_TH.dtype)
        return Tempered(replace(targets, hidden_TH=hidden_TH), temperature_T)

    def _entropy(self, targets: DenseTargets) -> Tensor:
        reading = read_head(
            targets.hidden_TH, targets.weight_vH, shard=self._shard, entropy=True, chunk_bytes=self._chunk_bytes
        )
        assert reading.entropy_T is not None
        return reading.entropy_T

    def _logit_std(self, hidden_TH: Tensor, weight_vH: Tensor) -> Tensor:
        """Return std(W h) = sqrt(h' C h) for each row h, fp32 ``[T]``, with C the covariance of W's rows.

        No logits are made, and C is computed once, because W is frozen.
        """
        if self._covariance_HH is None or self._head is not weight_vH:
            self._covariance_HH, self._head = _covariance(weight_vH, self._shard), weight_vH
        product_TH = hidden_TH @ self._covariance_HH.to(hidden_TH.dtype)
        return (product_TH * hidden_TH).sum(-1).clamp_min(0).sqrt()


def _covariance(weight_vH: Tensor, shard: VocabShard) -> Tensor:
    """Return the covariance ``[H, H]`` of the head's rows, of all ranks of the group, without rows of padding."""
    rows_vH = weight_vH[: shard.num_valid]
    dtype = torch.promote_types(rows_vH.dtype, torch.float32)
    mean_H = _over_group(rows_vH.sum(0, dtype=dtype), shard) / shard.vocab_size
    total_HH = torch.zeros(len(mean_H), len(mean_H), dtype=dtype, device=rows_vH.device)
    for start in range(0, len(rows_vH), _ROWS):
        centred_vH = rows_vH[start : start + _ROWS].to(dtype) - mean_H
        total_HH.addmm_(centred_vH.t(), centred_vH)
    return _over_group(total_HH, shard) / shard.vocab_size


def _over_group(partial: Tensor, shard: VocabShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(partial, group=shard.group)
    return partial

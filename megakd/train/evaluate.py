"""Evaluation on held-out data: the same global batches every time, forward only, through the same head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megakd.data.loader import Loader, Microbatch
from megakd.data.samples.label_bytes import BYTES_OF, label_bytes
from megakd.data.samples.protocol import Samples
from megakd.losses.calibration import NUM_BINS, calibration_error
from megakd.parallel import Groups
from megakd.teachers.protocol import Teacher
from megakd.train.objective.objective import Objective
from megakd.train.optim import Student
from megakd.train.step import run_step

_OF_KD = ("kd", "agreement", "teacher_entropy")


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out tokens that the loss mask keeps, in nats; no gate leaves any token out.

    lm_loss: cross-entropy of the labels, which compares runs of every kind. kd_loss, agreement, teacher_entropy: means
    over the tokens with targets; None if no teacher has targets for the held-out data. total_loss: the objective of
    the training, ``lm_weight`` x LM + ``alpha`` x KD with the largest alpha of a schedule (and the z-loss); None if the
    run distils and no teacher has targets for the held-out data. bits_per_byte: LM loss summed over tokens, in bits,
    over the UTF-8 bytes of the original text that these tokens stand for (`label_bytes`); it compares models of
    different tokenizers, and is None where a dataset does not record its bytes. calibration_error: difference between
    the probability of the student's best id and the share of tokens where that id is the label, over 15 bins; 0 to 1.
    """

    lm_loss: float
    kd_loss: float | None
    total_loss: float | None
    alpha: float | None
    lm_weight: float | None
    agreement: float | None
    teacher_entropy: float | None
    z_loss: float | None
    bits_per_byte: float | None
    calibration_error: float
    num_tokens: int
    held_out: HeldOut

    def as_dict(self) -> dict[str, Any]:
        """Return the figures that are known, by name."""
        return {key: value for key, value in self.__dict__.items() if value is not None and key != "held_out"}


@dataclass(frozen=True)
class HeldOut:
    """Held-out data of an evaluation; two evaluations are comparable if theirs are equal.

    fingerprint: XXH3-128 of the datasets, their weights, packing, sequence length and order. num_samples: number of
    samples, from the beginning of that order. num_tokens: their labels that the loss mask keeps. num_bytes: UTF-8 bytes
    of the text of those labels; bytes_of: the rule by which they are counted (`label_bytes.BYTES_OF`); tokenizer: the
    tokenizer's hash; each None if it is not known.
    """

    fingerprint: str
    num_samples: int
    num_tokens: int
    num_bytes: int | None
    tokenizer: str | None
    bytes_of: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are known, by name."""
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class Evaluator:
    """Evaluation of the student on the same ``num_batches`` global batches every time it is called.

    teacher, objective: for held-out data. batches: opens these batches from their beginning. distils: the training has
    a KD term. counts_bytes: True if every dataset records the bytes of its text, for bits per byte. tokenizer: hash of
    the tokenizer that made the data, None where it is not known.
    """

    student: Student
    teacher: Teacher
    objective: Objective
    groups: Groups
    batches: Callable[[], Loader]
    num_batches: int
    distils: bool
    counts_bytes: bool
    tokenizer: str | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> Evaluation:
        """Evaluate after ``step``, which errors name. All ranks call it."""
        self.student.whole()
        for chunk in self.student.wrapped:
            chunk.eval()
        sums: dict[str, float] = {}
        calibration = torch.zeros(2, NUM_BINS, dtype=torch.float64)
        num_tokens, num_kd_tokens, num_bytes = 0, 0, 0
        batches = self.batches()
        for _ in range(self.num_batches):
            batch = next(batches)
            result = run_step(
                self.student, batch, self.teacher, self.objective, self.groups, step=step, forward_only=True
            )
            num_tokens += result.num_tokens
            num_kd_tokens += result.num_kd_tokens
            for key in ("loss", "lm", "z_loss", *_OF_KD):
                value, count = getattr(result, key), result.num_kd_tokens if key in _OF_KD else result.num_tokens
                if value is not None:
                    sums[key] = sums.get(key, 0.0) + value * count
            if result.calibration is not None:
                calibration += result.calibration
            if self.counts_bytes:
                num_bytes += sum(_bytes_of(microbatch, batches.blend.datasets) for microbatch in batch)
        for chunk in self.student.wrapped:
            chunk.train()
        error = calibration_error(calibration, num_tokens)
        held_out = self._held_out(batches, num_tokens, self._over_ranks(num_bytes))
        return self._result(sums, held_out, num_kd_tokens, error)

    def _held_out(self, batches: Loader, num_tokens: int, num_bytes: int) -> HeldOut:
        """Return the description of what was read from ``batches`` so far."""
        fingerprint, num_samples = batches.order_fingerprint(), batches.consumed_samples
        if not num_bytes:
            return HeldOut(fingerprint, num_samples, num_tokens, None, self.tokenizer)
        return HeldOut(fingerprint, num_samples, num_tokens, num_bytes, self.tokenizer, BYTES_OF)

    def _over_ranks(self, count: int) -> int:
        total = torch.tensor(count, dtype=torch.int64, device=self.groups.device)
        dist.all_reduce(total, group=self.groups.collection.dp)
        return int(total)

    def _result(
        self, sums: dict[str, float], held_out: HeldOut, num_kd_tokens: int, calibration_error: float
    ) -> Evaluation:
        counts = dict.fromkeys(sums, held_out.num_tokens) | dict.fromkeys(_OF_KD, num_kd_tokens)
        means = {key: total / max(counts[key], 1) for key, total in sums.items()}
        knows = self.objective.term is not None
        return Evaluation(
            lm_loss=means["lm"],
            kd_loss=means.get("kd"),
            total_loss=means["loss"] if knows or not self.distils else None,
            alpha=self.objective.alpha if knows else None,
            lm_weight=self.objective.lm_share if knows else None,
            agreement=means.get("agreement"),
            teacher_entropy=means.get("teacher_entropy"),
            z_loss=means.get("z_loss"),
            bits_per_byte=sums["lm"] / math.log(2) / held_out.num_bytes if held_out.num_bytes else None,
            calibration_error=calibration_error,
            num_tokens=held_out.num_tokens,
            held_out=held_out,
        )


def _bytes_of(microbatch: Microbatch, datasets: Sequence[Samples]) -> int:
    """Bytes of text of the labels that count in a microbatch of samples of several datasets."""
    ids_B, mask_BS = microbatch.sample_ids_B, microbatch.loss_mask_BS
    of_dataset = ((datasets[i], microbatch.dataset_ids_B == i) for i in np.unique(microbatch.dataset_ids_B).tolist())
    return sum(label_bytes(samples, ids_B[rows_B], mask_BS[rows_B]) for samples, rows_B in of_dataset)

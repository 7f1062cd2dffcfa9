"""Evaluation on held-out data: the same global batches every time, forward only, through the same head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.data.blend import Blend
from megakd.data.loader import Loader
from megakd.model.teacher import Teacher
from megakd.parallel import Groups
from megakd.train.calibration import NUM_BINS, calibration_error
from megakd.train.config import TrainConfig
from megakd.train.objective import Objective
from megakd.train.optim import Student
from megakd.train.step import run_step

_OF_KD = ("kd", "agreement", "teacher_entropy")


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out tokens, in nats, those of KD over the tokens about which the teacher says anything; no
    gate leaves any out. ``bits_per_byte`` is None without a tokenizer.

    bits_per_byte: LM loss summed over tokens, in bits, over the UTF-8 bytes those tokens stand for; it compares
    models of different tokenizers. calibration_error: how far the probability of the student's best id is from how
    often that id is the label, over 15 bins; 0 to 1.
    """

    loss: float
    lm_loss: float
    kd_loss: float | None
    agreement: float | None
    teacher_entropy: float | None
    z_loss: float | None
    bits_per_byte: float | None
    calibration_error: float
    num_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass(frozen=True)
class Evaluator:
    """Runs ``eval_iters`` global batches from the beginning of the held-out order.

    token_bytes: ``[V]``, UTF-8 bytes of each token, for bits per byte; None leaves it out.
    """

    student: Student
    teacher: Teacher
    objective: Objective
    groups: Groups
    blend: Blend
    config: TrainConfig
    vocab_size: int
    token_bytes: NDArray[np.int32] | None

    @torch.no_grad()
    def __call__(self, step: int) -> Evaluation:
        """Evaluate after ``step`` (named in errors). All ranks call it."""
        self.student.whole()
        for chunk in self.student.wrapped:
            chunk.eval()
        sums: dict[str, float] = {}
        calibration = torch.zeros(2, NUM_BINS, dtype=torch.float64)
        num_tokens, num_kd_tokens, num_bytes = 0, 0, 0
        batches = self._batches()
        for _ in range(self._num_batches()):
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
            if self.token_bytes is not None:
                num_bytes += sum(int(self.token_bytes[mb.labels_BS][mb.loss_mask_BS].sum()) for mb in batch)
        for chunk in self.student.wrapped:
            chunk.train()
        error = calibration_error(calibration, num_tokens)
        return self._result(sums, num_tokens, num_kd_tokens, self._over_ranks(num_bytes), error)

    def _num_batches(self) -> int:
        """``eval_iters``, or fewer: no sample is counted twice while another has not been seen."""
        available = sum(samples.num_samples for samples in self.blend.datasets)
        return max(1, min(self.config.evaluate.eval_iters, available // self.config.training.global_batch_size))

    def _batches(self) -> Loader:
        return Loader(
            self.blend,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            global_batch_size=self.config.training.global_batch_size,
            data_parallel_rank=self.groups.data_rank,
            data_parallel_size=self.groups.data_size,
            vocab_size=self.vocab_size,
        )

    def _over_ranks(self, count: int) -> int:
        total = torch.tensor(count, dtype=torch.int64, device=self.groups.device)
        dist.all_reduce(total, group=self.groups.collection.dp)
        return int(total)

    def _result(
        self, sums: dict[str, float], num_tokens: int, num_kd_tokens: int, num_bytes: int, calibration_error: float
    ) -> Evaluation:
        counts = dict.fromkeys(sums, num_tokens) | dict.fromkeys(_OF_KD, num_kd_tokens)
        means = {key: total / max(counts[key], 1) for key, total in sums.items()}
        return Evaluation(
            loss=means["loss"],
            lm_loss=means["lm"],
            kd_loss=means.get("kd"),
            agreement=means.get("agreement"),
            teacher_entropy=means.get("teacher_entropy"),
            z_loss=means.get("z_loss"),
            bits_per_byte=sums["lm"] / math.log(2) / num_bytes if num_bytes else None,
            calibration_error=calibration_error,
            num_tokens=num_tokens,
        )

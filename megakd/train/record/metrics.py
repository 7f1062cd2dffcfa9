"""Record of a run: console lines in Megatron's form, a JSON line for each step, and the writers. Rank 0 writes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from megakd.artefacts.manifest import atomic_write
from megakd.artefacts.run_lock import HeldError, RunLock
from megakd.errors import UsageError
from megakd.model.config import ModelShape
from megakd.train.config import LoggingConfig, TrainingConfig
from megakd.train.evaluate import Evaluation
from megakd.train.optim import Update
from megakd.train.record.writers import Opening, Writer, build_writers
from megakd.train.step import StepLoss
from megakd.work.console import tell

_LONGEST_SECONDS = 86_400.0 * 36_525  # longest remaining time that is shown: a hundred years


@dataclass(frozen=True)
class Cost:
    """Cost of one token in floating-point operations: the student's training, and the teacher's forward pass."""

    student: float
    teacher: float

    @classmethod
    def of(cls, student: ModelShape, teacher: ModelShape | None, *, seq_length: int, vocab_size: int) -> Cost:
        """Count the operations of two models. Backward is twice the forward; a multiply-add counts as two.

        Recomputed activations are not counted.
        """
        forward = student.flops_forward(seq_length=seq_length, vocab_size=vocab_size)
        asked = teacher.flops_forward(seq_length=seq_length, vocab_size=vocab_size) if teacher else 0.0
        return cls(3.0 * forward, asked)


class Metrics:
    """Writer of ``SAVE/metrics.jsonl``, a line for every step and evaluation, and of console lines.

    A console line is printed every ``log_interval`` steps. It also feeds the writers that are asked for (TensorBoard,
    Weights & Biases, MLflow).
    """

    def __init__(
        self,
        training: TrainingConfig,
        logging: LoggingConfig,
        cost: Cost,
        *,
        seq_length: int,
        folder: Path | None,
        settings: Mapping[str, Any],
        rank: int,
        world_size: int,
        start_step: int,
        trains: bool = True,
        evaluated: str | None = None,
    ) -> None:
        """Open the record of a run.

        folder: of the run, None without ``--save``. settings: the whole configuration as plain data, for trackers.
        trains: False for a run that only evaluates; evaluated: fingerprint of the checkpoint that it evaluates.
        """
        self._training, self._logging, self._cost = training, logging, cost
        self._seq_length, self._world_size = seq_length, world_size
        self._writes = rank == 0
        self._start_step, self._evaluated = start_step, evaluated
        self._start = self._last = time.perf_counter()
        self._times: list[float] = []
        self._token_flops: list[float] = []
        self._batch_sizes: list[int] = []
        self._samples = training.batch_sizes.consumed_after(start_step)
        self._file: int | None = None
        self._writers: list[Writer] = []
        if not self._writes:
            return
        if folder is not None:
            self._open(folder, last_step=start_step if trains else math.inf)
        continues = start_step > 0 or not trains
        self._writers = build_writers(Opening(logging, folder, settings, start_step, continues, self.say))

    def _open(self, folder: Path, *, last_step: float) -> None:
        """Take the folder of the run and cut the record back to ``last_step``, which it goes on from."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        path = folder / "metrics.jsonl"
        _keep_until(path, last_step)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def start_clock(self) -> None:
        """Begin the time of the next step now: building, evaluating and saving before it do not count."""
        self._last = time.perf_counter()

    def log(self, step: int, loss: StepLoss, update: Update, *, samples: int) -> None:
        """Record one step; print the first and every ``log_interval``-th. samples: consumed by the run so far."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._times.append(seconds)
        self._token_flops.append(self._cost.student + self._cost.teacher * loss.modelled_share)
        training = self._training
        size, self._samples = samples - self._samples, samples
        # a continued run may have another batch size: then the first difference is no batch size
        self._batch_sizes.append(size if size in training.batch_sizes.levels else training.global_batch_size)
        record: dict[str, Any] = {
            "step": step,
            "samples": samples,
            "tokens": samples * self._seq_length,
            "loss": loss.loss,
            "lm_loss": loss.lm,
            "kd_loss": loss.kd,
            "agreement": loss.agreement,
            "teacher_entropy": loss.teacher_entropy,
            "kd_share": loss.kd_share,
            "stored_share": loss.stored_share,
            "taid_t": loss.taid_t,
            "alpha": loss.alpha,
            "lm_weight": loss.lm_weight,
            "temperature": loss.temperature,
            "z_loss": loss.z_loss,
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "seconds": seconds,
        }
        tokens = training.global_batch_size * self._seq_length
        record["flops"] = tokens * self._cost.student
        if loss.modelled_share:
            record["teacher_flops"] = tokens * self._cost.teacher * loss.modelled_share
        self._write({key: value for key, value in record.items() if value is not None})
        if step % self._logging.log_interval == 0 or step in (self._start_step + 1, training.train_iters):
            self._report(step, record)
            self._times.clear()
            self._token_flops.clear()
            self._batch_sizes.clear()

    def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record and print one evaluation."""
        values = evaluation.as_dict()
        record: dict[str, Any] = {"step": step, "valid": values, "held_out": evaluation.held_out.as_dict()}
        self._write(record if self._evaluated is None else {**record, "checkpoint": self._evaluated})
        for writer in self._writers:
            writer.add({f"{key.replace('_', ' ')} validation": value for key, value in values.items()}, step=step)
        self.say(f"validation at iteration {step} | {_line(evaluation)} |")

    def log_checkpoint(self, path: Path) -> None:
        """Print that a whole checkpoint is at ``path``."""
        self.say(f"saved checkpoint {path}")

    def say(self, text: str) -> None:
        """Print one line with the time, on rank 0."""
        if self._writes:
            tell(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}", on="stdout")

    def close(self, *, complete: bool = True) -> None:
        """Close the record and the writers. complete: True if the run did all of its steps."""
        for writer in self._writers:
            writer.close(complete=complete)
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._lock.__exit__()

    def _report(self, step: int, record: dict[str, Any]) -> None:
        training = self._training
        seconds = sum(self._times) / len(self._times)
        tokens = sum(self._batch_sizes) / len(self._batch_sizes) * self._seq_length
        flops = tokens * sum(self._token_flops) / len(self._token_flops)
        throughput = flops / seconds / self._world_size / 1e12
        left = timedelta(seconds=round(min(seconds * (training.train_iters - step), _LONGEST_SECONDS)))
        parts = [
            f"iteration {step:8d}/{training.train_iters:8d}",
            f"consumed samples: {record['samples']:12d}",
            f"elapsed time per iteration (ms): {seconds * 1000:.1f}",
            f"throughput per GPU (TFLOP/s/GPU): {throughput:.3f}",
            f"tokens/s: {tokens / seconds:.0f}",
            f"learning rate: {record['lr']:.6E}",
            f"global batch size: {self._batch_sizes[-1]:5d}",
            f"lm loss: {record['lm_loss']:.6E}",
        ]
        if record["kd_loss"] is not None:
            parts += [f"kd loss: {record['kd_loss']:.6E}", f"agreement: {record['agreement']:.4f}"]
        for key in ("alpha", "temperature", "kd_share", "stored_share", "taid_t", "z_loss"):
            if record[key] is not None:
                parts.append(f"{key.replace('_', ' ')}: {record[key]:.4f}")
        parts += [f"grad norm: {record['grad_norm']:.3f}", f"ETA: {left}"]
        self.say(" | ".join(parts) + " |")
        if self._writers:
            named = {
                "learning-rate": record["lr"], "grad-norm": record["grad_norm"], "iteration-time": seconds,
                "throughput": throughput, "tokens-per-second": tokens / seconds, "total loss": record["loss"],
                "lm loss": record["lm_loss"], "kd loss": record["kd_loss"], "teacher agreement": record["agreement"],
                "teacher entropy": record["teacher_entropy"], "kd share": record["kd_share"],
                "stored share": record["stored_share"],
                "taid t": record["taid_t"], "z loss": record["z_loss"], "kd alpha": record["alpha"],
                "lm weight": record["lm_weight"], "kd temperature": record["temperature"],
            }  # fmt: skip
            known = {tag: float(value) for tag, value in named.items() if value is not None}
            for writer in self._writers:
                writer.add(known, step=step, samples=record["samples"])

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, orjson.dumps(record) + b"\n")


def _line(evaluation: Evaluation) -> str:
    """Return the printed line of an evaluation, with the weights that the total loss is made of."""
    values = evaluation.as_dict()
    alpha, lm_weight = values.pop("alpha", None), values.pop("lm_weight", None)
    shown = {key: f"{key.replace('_', ' ')}: {value:.6g}" for key, value in values.items()}
    if alpha is not None:
        shown["total_loss"] += f" ({lm_weight:g} lm + {alpha:g} kd)"
    elif "total_loss" not in shown:
        shown["total_loss"] = "total loss: not known, no teacher speaks about the held-out data"
    return " | ".join(shown.values())


def _lock(folder: Path) -> RunLock:
    """Lock the folder against a second run, which would overwrite this one's checkpoints.

    Raises UsageError if another run has it.
    """
    try:
        return RunLock(folder / ".lock").__enter__()
    except HeldError as error:
        raise UsageError(
            f"--save {folder} is in use by another run; stop it or give this one a folder of its own ({error})"
        ) from None


def _keep_until(path: Path, step: float) -> None:
    """Drop the lines of steps after ``step``, the checkpoint that the run goes on from: those steps come again.

    A line that a kill cut short is always dropped.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            break  # the line that was being written when the run was killed
        if record["step"] <= step:
            kept.append(line)
    atomic_write(path, b"".join(line + b"\n" for line in kept))

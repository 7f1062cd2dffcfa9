"""Capture: the teacher's distributions over the samples of one shard after the other, to rows.

Axes: ``S`` sequence, ``B`` microbatch, ``T`` = S x B tokens, sequence first, ``N`` draws.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from megakd.data.loader import Microbatch
from megakd.errors import CorruptError, ExitStatus
from megakd.logits.codec import Rows
from megakd.losses.read import HeadReading
from megakd.parallel import Groups
from megakd.pipeline.capture.preflight import CaptureConfig, CapturePlan
from megakd.pipeline.capture.store_parts import Captured
from megakd.pipeline.frozen.batches import Stretches
from megakd.pipeline.frozen.model import FrozenModel, build_frozen, provenance_of, vocab_shard
from megakd.pipeline.frozen.run import work_through
from megakd.pipeline.score.columns import RangeColumns, log_prob_columns
from megakd.targets import DenseTargets
from megakd.teachers.head_rows import RowReader, draw_numbers, finite_samples, split_samples, token_positions
from megakd.teachers.model_teacher import ModelTeacher
from megakd.work.progress import RangeProgress

_SAMPLES_AT_ONCE = 64  # their rows are held until they can be added in the order of their ids


def capture(config: CaptureConfig, plan: CapturePlan) -> ExitStatus:
    """Capture the samples that ``--output`` lacks, together with all other ranks and jobs that do.

    All ranks call it. Returns COMPLETE once the whole store is there, STOPPED if a signal came first.

    Raises CorruptError for logits or log-probabilities that are not finite, or if finished shards are damaged.
    """
    return work_through(
        plan.work,
        partial(build_capturer, config, plan),
        config.parallel(),
        seq_length=config.seq_length,
        log_interval=config.log_interval,
        done="captured",
    )


def build_capturer(config: CaptureConfig, plan: CapturePlan, groups: Groups) -> Capturer:
    """Load the teacher in the layout of ``groups``. All ranks call it."""
    return Capturer(config, plan, build_frozen(plan.record, plan.shape, groups, seq_length=config.seq_length), groups)


class Capturer:
    """`RangeMaker` of a store's shards: one copy of the teacher. teacher: in the layout of ``groups``."""

    def __init__(self, config: CaptureConfig, plan: CapturePlan, teacher: ModelTeacher, groups: Groups) -> None:
        self._teacher, self._plan, self._groups = config.load, plan, groups
        self._model = FrozenModel(
            plan.samples,
            teacher,
            groups.parallel,
            micro_batch_size=config.micro_batch_size,
            vocab_size=plan.record.vocab_size,
            eod_mask_loss=config.mask_policy != "all",
            eod_token=plan.eod_token,
        )
        self._reader = RowReader(
            plan.spec,
            shard=vocab_shard(plan.record, plan.shape, groups),
            implementation=config.loss_implementation,
            chunk_bytes=config.head_chunk_mbytes << 20,
        )
        self.provenance = provenance_of(
            groups.parallel,
            micro_batch_size=config.micro_batch_size,
            range_samples=plan.work.range_samples,
            head_chunk_mbytes=config.head_chunk_mbytes,
        )

    def make(
        self, start: int, stop: int, progress: RangeProgress | None = None, *, ids: NDArray[np.int64]
    ) -> Captured | None:
        """Capture the samples ``ids`` (ascending) of the range ``[start, stop)``.

        Every rank of the copy calls it. Returns the shard, not yet committed, and the scores; None on all ranks but
        the leader.
        """
        work = self._plan.work
        leads = self._groups.has_output(None) and self._groups.tensor_rank == 0
        shard = work.new_shard(start // work.range_samples) if leads else None
        columns = None
        if work.scores is not None:
            columns = RangeColumns(work.scores.columns, start, stop, ids, self._plan.spec.seq_length)
        for first in range(0, len(ids), _SAMPLES_AT_ONCE):
            chunk = ids[first : first + _SAMPLES_AT_ONCE]
            held: dict[int, tuple[NDArray[np.int64], Rows]] = {}
            for part, microbatch, targets, share in self._model.outputs(chunk):
                reading = self._read(microbatch, targets)
                if shard is not None:
                    rows = self._reader.rows(reading, self._positions(microbatch))
                    held |= _by_sample(part, microbatch, rows)
                    if columns is not None:
                        moved = replace(part, places=part.places + first)
                        columns.add(moved, log_prob_columns(reading, microbatch, self._teacher))
                if progress is not None:
                    progress.tick(first + int(len(chunk) * share))
            if shard is not None:
                for sample in chunk.tolist():
                    shard.add(sample, *held[sample])
        return None if shard is None else Captured(shard, {} if columns is None else columns.finish())

    def _read(self, microbatch: Microbatch, targets: DenseTargets) -> HeadReading:
        labels_T = None
        if self._plan.work.scores is not None:
            labels_T = torch.from_numpy(microbatch.labels_BS).to(self._groups.device).t().reshape(-1)
        uniforms_TN = self._uniforms(microbatch) if self._reader.draws else None
        reading = self._reader.read(targets.hidden_TH, targets.weight_vH, uniforms_TN=uniforms_TN, ids_T=labels_T)
        finite_B = finite_samples(reading, len(microbatch.sample_ids_B))
        if not finite_B.all():
            raise CorruptError(
                f"{self._teacher}: the logits of samples {microbatch.sample_ids_B[~finite_B][:8].tolist()} are not "
                "finite: the weights are broken, or the precision (--bf16, --fp8-format) does not hold them"
            )
        return reading

    def _positions(self, microbatch: Microbatch) -> NDArray[np.int64]:
        """``[T]`` int64: token positions of the inputs in the dataset."""
        return token_positions(self._plan.samples.starts(microbatch.sample_ids_B), microbatch.tokens_BS.shape[1])

    def _uniforms(self, microbatch: Microbatch) -> torch.Tensor:
        """``[T, N]`` float64: the numbers from 0 to 1 that the draws are made with."""
        starts_B = self._plan.samples.starts(microbatch.sample_ids_B)
        numbers_SBN = draw_numbers(starts_B, microbatch.tokens_BS.shape[1], self._plan.spec)
        return torch.from_numpy(numbers_SBN).flatten(0, 1).to(self._groups.device)


def _by_sample(part: Stretches, microbatch: Microbatch, rows: Rows) -> dict[int, tuple[NDArray[np.int64], Rows]]:
    """Input ids and rows of each sample, by sample id: one row for each label."""
    samples = zip(microbatch.sample_ids_B.tolist(), microbatch.tokens_BS, split_samples(rows, part.lengths - 1))
    return {sample: (tokens[: row.num_rows], row) for sample, tokens, row in samples}

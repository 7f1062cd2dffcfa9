"""Scoring: a model, or a proxy, applied to the samples of one range after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.loader import Microbatch
from megakd.errors import ExitStatus
from megakd.parallel import Groups
from megakd.pipeline.frozen.model import FrozenModel, build_frozen, provenance_of, vocab_shard
from megakd.pipeline.frozen.run import work_through
from megakd.pipeline.score.columns import LogProbColumns, PredictedColumns, RangeColumns
from megakd.pipeline.score.preflight import ScoreConfig, ScorePlan
from megakd.targets import DenseTargets
from megakd.teachers.model_teacher import ModelTeacher
from megakd.work.progress import RangeProgress


def score(config: ScoreConfig, plan: ScorePlan) -> ExitStatus:
    """Score the samples that ``--output`` lacks, together with all other ranks and jobs that do.

    All ranks call it. Returns COMPLETE once the whole scores are there, STOPPED if a signal came first.

    Raises CorruptError for log-probabilities that are not finite, or if finished ranges are damaged.
    """
    return work_through(
        plan.parts,
        partial(build_scorer, config, plan),
        config.parallel(),
        seq_length=config.seq_length,
        log_interval=config.log_interval,
        done="scored",
    )


class Scorer:
    """`RangeMaker` of scores: one copy of the model. teacher: the model, in the layout of ``groups``."""

    def __init__(self, config: ScoreConfig, plan: ScorePlan, teacher: ModelTeacher, groups: Groups) -> None:
        self._names, self._seq_length = plan.parts.columns, config.seq_length
        self._model = FrozenModel(
            plan.samples,
            teacher,
            groups.parallel,
            micro_batch_size=config.micro_batch_size,
            vocab_size=plan.record.vocab_size,
            eod_mask_loss=config.mask_policy != "all",
            eod_token=plan.eod_token,
            by_document=config.mask_policy == "reset" and plan.proxy is None,  # a proxy judges samples as a whole
        )
        self._answer: Callable[[DenseTargets, Microbatch], dict[str, NDArray[Any]]]
        if plan.proxy is not None:
            self._answer = PredictedColumns(plan.proxy, groups.device)
        else:
            self._answer = LogProbColumns(
                plan.parts.columns,
                plan.record.path,
                vocab_shard(plan.record, plan.shape, groups),
                groups.device,
                implementation=config.loss_implementation,
                chunk_bytes=config.head_chunk_mbytes << 20,
            )
        self.provenance = provenance_of(
            groups.parallel,
            micro_batch_size=config.micro_batch_size,
            range_samples=plan.parts.range_samples,
            head_chunk_mbytes=config.head_chunk_mbytes,
        )

    def make(
        self, start: int, stop: int, progress: RangeProgress | None = None, *, ids: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Score the samples ``ids`` (ascending; None: all) of the range ``[start, stop)``.

        Every rank of the copy calls it. Returns the columns over the range by file name, filled on the last stage only.
        """
        ids = np.arange(start, stop) if ids is None else ids
        columns = RangeColumns(self._names, start, stop, ids, self._seq_length)
        for part, microbatch, targets, share in self._model.outputs(ids):
            columns.add(part, self._answer(targets, microbatch))
            if progress is not None:
                progress.tick(int(len(ids) * share))
        return columns.finish()


def build_scorer(config: ScoreConfig, plan: ScorePlan, groups: Groups) -> Scorer:
    """Load the model in the layout of ``groups``. All ranks call it."""
    teacher = build_frozen(plan.record, plan.shape, groups, seq_length=config.seq_length)
    return Scorer(config, plan, teacher, groups)

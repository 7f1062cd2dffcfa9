"""Scoring itself: a model over one range of samples after the other, each data-parallel copy of it on its own.

Axes: ``n`` samples of a range, ``S`` sequence, ``B`` microbatch, ``H`` hidden, ``T`` = S x B tokens, sequence first.

Which samples meet in one matrix product depends on ``--range-samples`` and ``--micro-batch-size`` alone
(`score_batches`), so a range has the same bits whoever scores it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.data.blend import Blend
from megakd.data.loader import Loader, Microbatch
from megakd.errors import ExitStatus
from megakd.layout import Coordinates, rank_of
from megakd.model.checkpoint import load_teacher
from megakd.model.gpt import build_model
from megakd.model.metadata import check_weights
from megakd.model.teacher import ModelTeacher
from megakd.parallel import Groups, init_parallel
from megakd.pipeline.interrupt import StopFlag
from megakd.pipeline.lock import RunLock
from megakd.pipeline.score_batches import Stretches, batch_pieces, cut_range, read_piece
from megakd.pipeline.score_columns import LogProbColumns, PredictedColumns
from megakd.pipeline.score_parts import Claim, Parts
from megakd.pipeline.score_plan import ScoreConfig, ScorePlan, padded_rows
from megakd.pipeline.score_progress import ScoreProgress
from megakd.pipeline.score_range import RangeColumns
from megakd.targets import DenseTargets

_STAGE_MICROBATCHES = 8  # in flight for each pipeline stage: fills it, and bounds the hidden states that are held
_ROWS_AT_ONCE = 64
_POLL_SECONDS = 0.2
_SAME_REQUEST_SECONDS = 2.0
# What a model's ranks do next, where it is not the range of that number. The largest that any of them brings counts.
_WAIT, _COMPLETE, _STOP, _FOLLOW = -1, -2, -3, -4


def score(config: ScoreConfig, plan: ScorePlan) -> ExitStatus:
    """Score what is missing in ``--output``, with all other ranks and jobs that do.

    All ranks call it. Returns COMPLETE once the whole scores are there, STOPPED if a signal came first.

    Raises CorruptError where the model gives no finite log-probabilities, or finished ranges were damaged.
    """
    groups = init_parallel(config.parallel(), seed=0)
    copy = _Copy(groups)
    parts = plan.parts
    if copy.first_word(parts.finished()):
        _say(groups, f"{config.output}: finished already")
        _tidy(parts, copy)
        return ExitStatus.COMPLETE
    scorer = build_scorer(config, plan, groups)
    progress = None
    if copy.leads and groups.data_rank == 0:
        progress = ScoreProgress(
            parts.num_scored,
            seq_length=config.seq_length,
            samples_done=parts.samples_done,
            interval=config.log_interval,
        )
    with RankStopFlag() as stop:
        while True:
            plans = _decide(parts) if copy.leads else _Decision(_FOLLOW)
            code = copy.agree(plans.code, stop=stop.is_set())
            if code == _WAIT:
                time.sleep(_POLL_SECONDS)
            elif code >= 0:
                columns = scorer.score(*parts.bounds(code), progress, ids=parts.ids_of(code))
                if plans.claim is not None:
                    parts.commit(plans.claim, columns, computed=scorer.computed)
            else:
                break
    if plans.claim is not None:
        plans.claim.release()
    if code == _STOP:
        _say(groups, "stopped by a signal; finished ranges are kept: the same command continues")
        return ExitStatus.STOPPED
    if plans.finish is not None:
        manifest = parts.finish(plans.finish)
        of = "" if parts.num_scored == parts.num_samples else f"{parts.num_scored} of "
        print(f"{config.output}: {of}{parts.num_samples} samples, fingerprint {manifest.fingerprint}", flush=True)
    elif copy.leads and groups.data_rank == 0:
        print(f"{config.output}: finished; another process joined the scores", file=sys.stderr, flush=True)
    _tidy(parts, copy)
    return ExitStatus.COMPLETE


@dataclass(frozen=True)
class _Decision:
    """What a leader means to do, with the lock that lets it."""

    code: int
    claim: Claim | None = None
    finish: RunLock | None = None


def _decide(parts: Parts) -> _Decision:
    if parts.finished():
        return _Decision(_COMPLETE)
    claim = parts.claim()
    if claim is not None:
        return _Decision(claim.index, claim=claim)
    if parts.complete:
        finish = parts.claim_finish()
        if finish is not None:
            return _Decision(_COMPLETE, finish=finish)
    return _Decision(_WAIT)  # others have what is left; they may die of it


class Scorer:
    """One copy of the model, and what it says about samples.

    teacher: the model, in the layout of ``groups``. computed: what the last bits of its answers depend on.
    """

    def __init__(self, config: ScoreConfig, plan: ScorePlan, teacher: ModelTeacher, groups: Groups) -> None:
        self._config, self._columns, self._teacher = config, plan.parts.columns, teacher
        self._samples, self._eod_token = plan.samples, plan.eod_token
        self._by_document = config.mask_policy == "reset" and plan.proxy is None  # a proxy judges samples as a whole
        self._loader = Loader(
            Blend([plan.samples], None, seed=0),
            seq_length=config.seq_length,
            micro_batch_size=1,
            global_batch_size=1,
            eod_token=plan.eod_token,
            eod_mask_loss=plan.eod_token is not None,
            vocab_size=plan.record.vocab_size,
        )
        answer = PredictedColumns(plan, groups) if plan.proxy else LogProbColumns(config, plan, groups)
        self._answer: Callable[[DenseTargets, Microbatch], dict[str, NDArray[Any]]] = answer
        self.computed = {
            "tensor": config.tensor_model_parallel_size,
            "pipeline": config.pipeline_model_parallel_size,
            "sequence_parallel": config.sequence_parallel,
            "micro_batch_size": config.micro_batch_size,
            "range_samples": plan.parts.range_samples,
            "head_chunk_mbytes": config.head_chunk_mbytes,
            "device": torch.cuda.get_device_name() if groups.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }

    def score(
        self, start: int, stop: int, progress: ScoreProgress | None = None, *, ids: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """The columns over the samples ``[start, stop)``; filled on the last stage. The copy's ranks all call it.

        ids: ascending, those of the range that are scored; None: all.
        """
        ids = np.arange(start, stop) if ids is None else ids
        columns = RangeColumns(self._columns, start, stop, ids, self._config.seq_length)
        stretches = self._stretches(ids)
        done = 0
        for batch in self._batches(ids, stretches):
            for part, microbatch, targets in zip(batch.stretches, batch, self._teacher.targets(batch)):
                assert isinstance(targets, DenseTargets)
                columns.add(part, self._answer(targets, microbatch))
                done += len(part.places)
                if progress is not None:
                    progress.tick(len(ids) * done // len(stretches.places))
        return columns.finish()

    def _stretches(self, ids: NDArray[np.int64]) -> Stretches:
        """What of the samples the model sees by itself."""
        if len(ids):
            self._samples.prefetch(ids)
        lengths = self._samples.lengths(ids)
        if not self._by_document:
            return Stretches.of_samples(lengths)
        assert self._eod_token is not None
        parts = []
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            part = Stretches.of_documents(self._samples.read(ids[some]), lengths[some], self._eod_token)
            parts.append(replace(part, places=part.places + first))
        return Stretches.join(parts)

    def _batches(self, ids: NDArray[np.int64], stretches: Stretches) -> Iterator[_Batch]:
        """The microbatches, as many at once as the pipeline likes."""
        config = self._config
        pieces = cut_range(
            stretches.lengths,
            micro_batch_size=config.micro_batch_size,
            seq_length=config.seq_length,
            tensor_size=config.tensor_model_parallel_size,
        )
        for batch in batch_pieces(pieces, limit=_STAGE_MICROBATCHES * config.pipeline_model_parallel_size):
            parts = [stretches[piece.places] for piece in batch]
            microbatches = [
                read_piece(self._loader, ids[part.places], piece.width, part) for part, piece in zip(parts, batch)
            ]
            yield _Batch(microbatches, parts)


@dataclass(frozen=True)
class _Batch:
    """Microbatches of this copy, in the form in which a teacher takes those of a step, and where each comes from."""

    microbatches: list[Microbatch]
    stretches: list[Stretches]

    @property
    def num_microbatches(self) -> int:
        return len(self.microbatches)

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Microbatch:
        """This copy's, whatever the rank: the copies work on ranges of their own."""
        return self.microbatches[index]

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)


class _Copy:
    """The ranks that hold one copy of the model. The first of its last stage, where scores appear, leads."""

    def __init__(self, groups: Groups) -> None:
        last = groups.parallel.pipeline_model_parallel_size - 1
        sizes = {"tensor": groups.parallel.tensor_model_parallel_size, "context": 1, "data": groups.data_size}
        self.leads = groups.rank == rank_of(Coordinates(0, 0, groups.data_rank, last), **sizes)
        self._groups = groups

    def agree(self, code: int, *, stop: bool) -> int:
        """What all ranks of the copy do: the leader's word, or `_STOP` if any was asked to and there is work left."""
        if self._groups.parallel.model_parallel_size > 1:
            both = torch.tensor([code, int(stop)], dtype=torch.int64, device=self._groups.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._groups.collection.mp)
            code, stop = int(both[0]), bool(both[1])
        return _STOP if stop and code != _COMPLETE else code

    def first_word(self, value: bool) -> bool:
        """Rank 0's, so that ranks which look at different moments do the same."""
        word = torch.tensor(int(value), device=self._groups.device)
        dist.broadcast(word, src=0)
        return bool(word)


class RankStopFlag(StopFlag):
    """As its base; but a launcher passes on what it gets, and a scheduler may signal launcher and ranks alike: what
    comes within two seconds of the first signal is the same request."""

    def __init__(self) -> None:
        super().__init__()
        self._asked_at: float | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            super()._handle(number, frame)
        elif now - self._asked_at > _SAME_REQUEST_SECONDS:
            super()._handle(number, frame)


def build_scorer(config: ScoreConfig, plan: ScorePlan, groups: Groups) -> Scorer:
    """The model of ``--load`` in the layout of ``groups``, ready to score. All ranks call it."""
    check_weights(plan.record.path, plan.record.shape, "--load")
    chunks = build_model(
        plan.shape, groups, vocab_size=plan.record.vocab_size, seq_length=config.seq_length, with_head=False
    )
    head_weight_vH = load_teacher(plan.record, chunks, groups, groups, rows=padded_rows(config, plan))
    return Scorer(config, plan, ModelTeacher(chunks, head_weight_vH, groups, groups), groups)


def _tidy(parts: Parts, copy: _Copy) -> None:
    """Remove what a process that was killed after the scores were whole, or one that came late, left of the parts."""
    if copy.leads and parts.has_leftovers and (lock := parts.claim_finish()) is not None:
        parts.finish(lock)


def _say(groups: Groups, text: str) -> None:
    if groups.rank == 0:
        print(text, file=sys.stderr, flush=True)

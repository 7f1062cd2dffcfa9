"""Loop of the verbs that run a frozen model over ranges of samples, in any number of copies and jobs at once.

The ranks that hold one copy of the model work on the same range; their leader claims it (`work.ranges`) and commits it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest
from megakd.artefacts.run_lock import RunLock
from megakd.errors import ExitStatus
from megakd.layout import Coordinates, ParallelConfig, rank_of
from megakd.parallel import Groups, init_parallel
from megakd.work.console import tell
from megakd.work.progress import RangeProgress
from megakd.work.ranges import Claim, RangeWork
from megakd.work.stop import StopFlag

_POLL_SECONDS = 0.2
# Decisions of a copy other than to work on a range, whose number is not negative. The largest of all its ranks counts.
_WAIT, _COMPLETE, _STOP, _FOLLOW = -1, -2, -3, -4

Result = TypeVar("Result")
ResultCo = TypeVar("ResultCo", covariant=True)


class RangeMaker(Protocol[ResultCo]):
    """One copy of a model that computes the results of ranges."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Settings, device and versions that the last bits of the results depend on."""

    def make(self, start: int, stop: int, progress: RangeProgress | None, *, ids: NDArray[np.int64]) -> ResultCo:
        """Compute the result for the samples ``ids`` of the range ``[start, stop)``.

        Every rank of the copy calls it; only the leader's return value is used.
        """


def work_through(
    work: RangeWork[Result],
    build: Callable[[Groups], RangeMaker[Result]],
    parallel: ParallelConfig,
    *,
    seq_length: int,
    log_interval: float,
    done: str,
) -> ExitStatus:
    """Compute the ranges that ``work`` lacks, together with all other ranks and jobs that do, and join them.

    All ranks call it. build: makes the model's copy, called only if there is anything to do. parallel: layout of the
    copy. log_interval: seconds between progress lines. done: word for a finished sample in them, such as "scored".

    Returns COMPLETE once the whole is there, STOPPED if a signal came first.
    """
    groups = init_parallel(parallel, seed=0)
    copy = _Copy(groups)
    if copy.first_word(work.finished()):
        _say(groups, f"{work.folder}: finished already")
        _tidy(work, copy)
        return ExitStatus.COMPLETE
    maker = build(groups)
    progress = None
    if copy.leads and groups.data_rank == 0:
        progress = RangeProgress(
            work.num_wanted,
            seq_length=seq_length,
            samples_done=work.samples_done,
            interval=log_interval,
            done=done,
        )
    with StopFlag() as stop:
        while True:
            decision = _decide(work) if copy.leads else _Decision(_FOLLOW)
            code = copy.agree(decision.code, stop=stop.is_set())
            if code == _WAIT:
                time.sleep(_POLL_SECONDS)
            elif code >= 0:
                result = maker.make(*work.bounds(code), progress, ids=work.ids_of(code))
                if decision.claim is not None:
                    work.commit(decision.claim, result, provenance=maker.provenance)
            else:
                break
    if decision.claim is not None:
        decision.claim.release()
    if code == _STOP:
        _say(groups, "stopped by a signal; finished ranges are kept: the same command continues")
        return ExitStatus.STOPPED
    if decision.finish is not None:
        manifest: Manifest = work.finish(decision.finish)
        of = "" if work.num_wanted == work.num_samples else f"{work.num_wanted} of "
        tell(f"{work.folder}: {of}{work.num_samples} samples, fingerprint {manifest.fingerprint}", on="stdout")
    elif copy.leads and groups.data_rank == 0:
        tell(f"{work.folder}: finished; another process had the last of it")
    _tidy(work, copy)
    return ExitStatus.COMPLETE


@dataclass(frozen=True)
class _Decision:
    """Next action of a leader, with the lock that allows it. code: number of a range, or a decision named above."""

    code: int
    claim: Claim | None = None
    finish: RunLock | None = None


def _decide(work: RangeWork[Any]) -> _Decision:
    if work.finished():
        return _Decision(_COMPLETE)
    claim = work.claim()
    if claim is not None:
        return _Decision(claim.index, claim=claim)
    if work.complete:
        finish = work.claim_finish()
        if finish is not None:
            return _Decision(_COMPLETE, finish=finish)
    return _Decision(_WAIT)  # other processes work on the rest; ranges of one that dies become free


class _Copy:
    """Ranks that hold one copy of the model. The first rank of the last stage, where results appear, leads."""

    def __init__(self, groups: Groups) -> None:
        last = groups.parallel.pipeline_model_parallel_size - 1
        sizes = {"tensor": groups.parallel.tensor_model_parallel_size, "context": 1, "data": groups.data_size}
        self.leads = groups.rank == rank_of(Coordinates(0, 0, groups.data_rank, last), **sizes)
        self._groups = groups

    def agree(self, code: int, *, stop: bool) -> int:
        """Decision for all ranks of the copy: the leader's, or `_STOP` if any rank was asked to stop before the end."""
        if self._groups.parallel.model_parallel_size > 1:
            both = torch.tensor([code, int(stop)], dtype=torch.int64, device=self._groups.device)
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._groups.collection.mp)
            code, stop = int(both[0]), bool(both[1])
        return _STOP if stop and code != _COMPLETE else code

    def first_word(self, value: bool) -> bool:
        """Value of rank 0, on every rank: ranks that look at the disk at different moments must act alike."""
        word = torch.tensor(int(value), device=self._groups.device)
        dist.broadcast(word, src=0)
        return bool(word)


def _tidy(work: RangeWork[Any], copy: _Copy) -> None:
    """Remove files of finished ranges that a process left which was killed while it removed them, or came late."""
    if copy.leads and work.has_leftovers and (lock := work.claim_finish()) is not None:
        work.finish(lock)


def _say(groups: Groups, text: str) -> None:
    if groups.rank == 0:
        tell(text)

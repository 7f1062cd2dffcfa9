"""Working through ranges of samples with a model: each data-parallel copy of it on its own, any number of jobs at once.

The ranks that hold one copy do the same range together; their leader claims it (`range_work`) and commits it.
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
# What a model's ranks do next, where it is not the range of that number. The largest that any of them brings counts.
_WAIT, _COMPLETE, _STOP, _FOLLOW = -1, -2, -3, -4

Result = TypeVar("Result")
ResultCo = TypeVar("ResultCo", covariant=True)


class RangeMaker(Protocol[ResultCo]):
    """Makes a range's result with one copy of the model. computed: what the last bits of it depend on."""

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def make(self, start: int, stop: int, progress: RangeProgress | None, *, ids: NDArray[np.int64]) -> ResultCo:
        """Of the samples ``ids`` of ``[start, stop)``. The copy's ranks all call it; what its leader gets counts."""


def work_through(
    work: RangeWork[Result],
    build: Callable[[Groups], RangeMaker[Result]],
    parallel: ParallelConfig,
    *,
    seq_length: int,
    log_interval: float,
    done: str,
) -> ExitStatus:
    """Make what is missing of ``work``, with all other ranks and jobs that do.

    All ranks call it. build: the maker, if there is anything to do. done: of the samples, for progress, as "scored".
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
    """What a leader means to do, with the lock that lets it."""

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
    return _Decision(_WAIT)  # others have what is left; they may die of it


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


def _tidy(work: RangeWork[Any], copy: _Copy) -> None:
    """Remove what a process that was killed after all was whole, or one that came late, left of the work."""
    if copy.leads and work.has_leftovers and (lock := work.claim_finish()) is not None:
        work.finish(lock)


def _say(groups: Groups, text: str) -> None:
    if groups.rank == 0:
        tell(text)

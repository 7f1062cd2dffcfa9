"""Run over the shards of a corpus: jobs for worker processes, watched and counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megakd.work.progress import DocumentProgress
from megakd.work.stop import StopFlag
from megakd.work.worker_pool import Job, OnMessage, WorkerPool


def run_shards(
    module: str,
    settings: dict[str, Any],
    jobs: Iterable[Job],
    on_message: OnMessage,
    *,
    num_workers: int,
    progress: DocumentProgress,
    stop: StopFlag,
) -> None:
    """Do all jobs in ``num_workers`` processes that run ``module`` with ``settings`` (see `WorkerPool.run`).

    on_message: takes a job and what a worker reports of it, and adds it to ``progress``, which is closed in the end.

    Raises StoppedBySignal, ChildProcessError for workers that keep dying, whatever a worker raises, and whatever
    ``on_message`` raises.
    """

    def stopped() -> bool:
        progress.tick()
        return stop.is_set()

    try:
        with WorkerPool(module, settings, num_workers, stopped=stopped) as pool:
            pool.run(jobs, on_message)
    finally:
        progress.close()

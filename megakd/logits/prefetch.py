"""Batches from a logits store, read ahead on threads: decoding needs no interpreter lock, so training goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.logits.store import BatchRows, LogitsStore

Request = tuple[NDArray[np.int64], NDArray[Any]]
"""Sample ids ``[B]`` and input ids ``[B, S]``."""


def prefetched(
    store: LogitsStore, requests: Iterable[Request], *, threads: int = 1, ahead: int = 2, width: int | None = None
) -> Iterator[BatchRows]:
    """``store.read_batch`` of each request, in their order.

    threads: how many batches are read at a time. ahead: how many are held, read or being read, besides the one that was
    yielded last: memory is bounded by that. Requests are taken from the iterable by the caller's thread.

    Raises what ``read_batch`` does, when the turn of that batch comes.
    """
    waiting: deque[Future[BatchRows]] = deque()
    pending = iter(requests)
    with ThreadPoolExecutor(threads, thread_name_prefix="logits") as pool:
        try:
            while True:
                while len(waiting) < max(ahead, 1) and (request := next(pending, None)) is not None:
                    waiting.append(pool.submit(store.read_batch, *request, width=width))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""Reading ahead on threads: what they do must need no interpreter lock, so that training goes on meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadAhead:
    """Threads that work ahead of whoever takes their results.

    threads: how many items are worked on at a time. ahead: how many are held, done or being done, until one of them is
    taken: memory is bounded by that.
    """

    def __init__(self, *, threads: int = 1, ahead: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="logits")
        self._ahead = max(ahead, 1)

    def __call__(self, read: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """``read(item)`` of each item, in their order; the first ones are begun at once. Items are taken by the
        caller's thread.

        Raises what ``read`` does, when the turn of that item comes; then there are no more.
        """
        waiting: deque[Future[Result]] = deque()
        pending = iter(items)
        self._fill(waiting, read, pending)
        return self._take(waiting, read, pending)

    def _fill(self, waiting: deque[Future[Result]], read: Callable[[Item], Result], pending: Iterator[Item]) -> None:
        while len(waiting) < self._ahead:
            try:
                item = next(pending)
            except StopIteration:
                return
            waiting.append(self._pool.submit(read, item))

    def _take(
        self, waiting: deque[Future[Result]], read: Callable[[Item], Result], pending: Iterator[Item]
    ) -> Generator[Result]:
        try:
            while True:
                self._fill(waiting, read, pending)
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

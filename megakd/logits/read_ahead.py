"""Reading ahead on threads. The work should release the interpreter lock, so that training goes on meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadAhead:
    """Threads that work ahead of the taker of their results.

    threads: number of items that are worked on at a time. ahead: largest number of items, done or being done, that are
    held until the next one is taken; it bounds the memory.
    """

    def __init__(self, *, threads: int = 1, ahead: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="logits")
        self._ahead = max(ahead, 1)

    def __call__(self, read: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
        """Yield ``read(item)`` of each item, in order; work on the first ones begins at once.

        Items are taken from the iterator on the caller's thread. Raises the error of ``read`` when the turn of its item
        comes, and ends there.
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

"""Reading ahead: begun at once, in order, bounded, and over when something fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megakd.logits.read_ahead import ReadAhead


def test_reading_begins_before_anything_is_taken() -> None:
    begun = [threading.Event() for _ in range(4)]

    def read(item: int) -> int:
        begun[item].set()
        return item * item

    results = ReadAhead(threads=1, ahead=2)(read, range(4))
    assert begun[1].wait(100) and not begun[2].is_set()
    assert list(results) == [0, 1, 4, 9] and begun[3].is_set()


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 3), (4, 2)])
def test_results_come_in_order_and_no_more_than_asked_for_are_held(threads: int, ahead: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    reader = ReadAhead(threads=threads, ahead=ahead)
    for _ in range(2):  # one step after another on the same threads
        taken.clear()
        for place, result in enumerate(reader(lambda item: -item, items())):
            assert result == -place and len(taken) <= place + ahead
        assert len(taken) == 20


def test_a_failure_comes_in_its_turn_and_ends_the_rest() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise ValueError("broken")
        return item

    results = ReadAhead(threads=2, ahead=3)(read, range(9))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(results)
    assert list(results) == []
    early = ReadAhead(ahead=3)(read, range(9))
    next(early)
    early.close()  # nothing hangs

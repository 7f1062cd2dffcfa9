"""The interface of teachers, and the teacher that says nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from megakd.data.loader import StepBatch
from megakd.targets import Given, Unreadable


class Batch(Protocol):
    """What a teacher needs of a step's batch: any data-parallel rank's microbatches, by index."""

    @property
    def num_microbatches(self) -> int: ...

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Any: ...


class Teacher(Protocol):
    """Gives targets for this rank's microbatches in order. Every rank must call it, once a step."""

    def targets(self, batch: StepBatch) -> Iterator[Given | Unreadable]: ...


class NoTeacher:
    """LM loss alone."""

    def targets(self, batch: Batch) -> Iterator[None]:
        return itertools.repeat(None)

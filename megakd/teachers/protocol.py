"""The interface of teachers, and the teacher that says nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

from megakd.data.loader import StepBatch
from megakd.targets import Given, Unreadable


class Batch(Protocol):
    """A step's batch as teachers read it: the microbatches of any data-parallel rank, by index."""

    @property
    def num_microbatches(self) -> int: ...

    def microbatch(self, index: int, data_parallel_rank: int | None = None) -> Any: ...


class Teacher(Protocol):
    """Source of targets for this rank's microbatches, in order. Every rank must call it once a step."""

    def targets(self, batch: StepBatch) -> Iterator[Given | Unreadable]: ...


class NoTeacher:
    """Teacher for LM loss alone: no targets for any microbatch."""

    def targets(self, batch: Batch) -> Iterator[None]:
        return itertools.repeat(None)

"""Work on ranges of samples: each is claimed by a lock and committed on its own; the last process joins them.

Range *r* is the samples ``[r * range_samples, (r + 1) * range_samples)``. In the folder of ranges ``R.json`` is the
manifest of a finished range, and ``R.lock``, a `RunLock`, is held by the process that works on it: the kernel drops
that lock with the process, so ranks and jobs come and go as they like.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.manifest import Manifest
from megakd.artefacts.run_lock import HeldError, RunLock

Result = TypeVar("Result")


@dataclass(frozen=True)
class Claim:
    """A range that this process alone works on, until `release`."""

    index: int
    lock: RunLock

    def release(self) -> None:
        """Let others have the range; what was committed stays."""
        self.lock.__exit__()


class RangeWork(ABC, Generic[Result]):
    """An artefact with a result for each sample of a dataset, in ``folder``, finished or in the making.

    ranges: the folder where ranges are committed. ids: the samples that are worked on, ascending; None: all.
    """

    def __init__(
        self, folder: Path, ranges: Path, *, num_samples: int, range_samples: int, ids: NDArray[np.int64] | None
    ) -> None:
        self.folder = folder
        self.num_samples = num_samples
        self.range_samples = range_samples
        self.num_ranges = -(-num_samples // range_samples)
        self._ranges = ranges
        self._ids = ids
        self._done: set[int] = set()
        self._first = 0  # every range before this one is done

    @abstractmethod
    def finished(self) -> bool:
        """Return whether the whole is there. Raises MismatchError for one of other inputs or settings."""

    @abstractmethod
    def commit(self, claim: Claim, result: Result, *, provenance: Mapping[str, Any]) -> None:
        """Make the result of a range durable, and release the claim.

        provenance: settings, and the device, that only the last bits of the result depend on; recorded beside it.
        """

    @abstractmethod
    def finish(self, lock: RunLock) -> Manifest:
        """Join the ranges to the whole, unless that is done, and remove what it no longer needs.

        lock: the right to do so, from `claim_finish`; released here.
        """

    @property
    @abstractmethod
    def has_leftovers(self) -> bool:
        """True if the folder holds files that the finished whole no longer needs."""

    @abstractmethod
    def _read(self, path: Path) -> Manifest | None:
        """The manifest of a finished range; None where there is none, or its files are missing or cut."""

    @property
    def complete(self) -> bool:
        """True if this process has seen every range finished."""
        return len(self._done) == self.num_ranges

    @property
    def num_wanted(self) -> int:
        """Number of samples that the whole will have results for."""
        return self.num_samples if self._ids is None else len(self._ids)

    def samples_done(self) -> int:
        """Number of samples in the ranges that are finished on disk, whoever made them."""
        finished = [int(name[:8]) for name in self._names() or () if name[:8].isdigit() and name.endswith(".json")]
        return sum(len(self.ids_of(index)) for index in finished if index < self.num_ranges)

    def bounds(self, index: int) -> tuple[int, int]:
        """First sample of range ``index``, and the sample after its last."""
        return index * self.range_samples, min((index + 1) * self.range_samples, self.num_samples)

    def ids_of(self, index: int) -> NDArray[np.int64]:
        """The samples of range ``index`` that are worked on, ascending."""
        start, stop = self.bounds(index)
        if self._ids is None:
            return np.arange(start, stop)
        return self._ids[slice(*np.searchsorted(self._ids, (start, stop)))]

    def claim(self) -> Claim | None:
        """Claim the first range that is neither finished nor being worked on; None without one at this moment."""
        self._ranges.mkdir(parents=True, exist_ok=True)
        while self._first in self._done:
            self._first += 1
        for index in range(self._first, self.num_ranges):
            if self._is_done(index):
                continue
            lock = RunLock(self._path(index, ".lock"))
            try:
                lock.__enter__()
            except HeldError:
                continue
            except FileNotFoundError:  # the folder is gone: another process has just finished the whole
                return None
            # Since the look above, the range may have been finished, or even joined with the others and removed.
            if not self._is_done(index) and not self.finished():
                return Claim(index, lock)
            lock.__exit__()
        return None

    def claim_finish(self) -> RunLock | None:
        """Take the lock that `finish` needs; None while another process has it."""
        lock = RunLock(self.folder / "finish.lock")
        try:
            return lock.__enter__()
        except HeldError:
            return None

    def _names(self) -> list[str] | None:
        """Names in the folder of ranges; None without the folder, as soon as another process has joined the ranges."""
        try:
            return os.listdir(self._ranges)
        except FileNotFoundError:
            return None

    def _is_done(self, index: int) -> bool:
        if index not in self._done and self._read(self._path(index, ".json")) is not None:
            self._done.add(index)
        return index in self._done

    def _path(self, index: int, suffix: str) -> Path:
        return self._ranges / f"{index:08d}{suffix}"

"""Unfinished logits store: its shards are ranges of samples, committed one by one, until one manifest completes it.

`work.ranges` shares them out. Scores from the same pass are committed with their shard.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, hash_file
from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.artefacts.run_lock import RunLock
from megakd.errors import CorruptError, UsageError
from megakd.logits.shard import ShardWriter
from megakd.logits.spec import FORMAT, MANIFEST, READABLE, SHARDS, StoreSpec
from megakd.logits.store import LogitsStore
from megakd.logits.store_writer import finish_store, read_shard, write_shard
from megakd.pipeline.frozen.output_folder import check_output
from megakd.pipeline.score.parts import Parts
from megakd.work.ranges import Claim, RangeWork

_LOCK = re.compile(r"[0-9]{8}\.lock")


@dataclass(frozen=True)
class Captured:
    """Result of a range: a shard with all of its samples, and the columns of scores; no columns without scores."""

    shard: ShardWriter
    columns: Mapping[str, NDArray[Any]]


class StoreWork(RangeWork[Captured | None]):
    """Logits store in ``folder``, finished or unfinished.

    ranks: ``[V]`` int32, frequency ranks of the ids. ids: the samples that get targets, ascending; None: all.
    scores: made in the same ranges; None: no scores.
    """

    def __init__(
        self,
        folder: Path,
        spec: StoreSpec,
        frequency_ranks: NDArray[np.int32],
        *,
        ids: NDArray[np.int64] | None = None,
        scores: Parts | None = None,
    ) -> None:
        super().__init__(
            folder, folder / SHARDS, num_samples=spec.num_samples, range_samples=spec.shard_samples, ids=ids
        )
        self.spec, self.frequency_ranks, self.scores = spec, frequency_ranks, scores

    def check_all(self) -> None:
        """Check what the folder holds. Writes nothing.

        Raises MismatchError for another store, finished or not, UsageError for anything else, CorruptError if a
        finished store has lost a shard.
        """
        check_output(self.folder, "--output", MANIFEST)
        if self.finished():
            LogitsStore(self.folder)  # looks at the size of every file
        else:
            for path in sorted(self._ranges.glob("[0-9]*.json")):
                if path.stem.isdigit() and int(path.stem) < self.num_ranges:
                    self._read(path)

    def finished(self) -> bool:
        path = self.folder / MANIFEST
        if not path.exists():
            return False
        manifest = read_manifest(path, format=FORMAT, version=READABLE)
        self.spec.check(manifest, self.frequency_ranks)
        if self.scores is not None and not self.scores.finished():
            raise UsageError(
                f"{self.folder}: this store is finished, and was captured without scores in {self.scores.folder}: "
                "score the samples with 'megakd score'"
            )
        return True

    @property
    def has_leftovers(self) -> bool:
        locks = any(map(_LOCK.fullmatch, self._names() or ()))
        return locks or (self.scores is not None and self.scores.has_leftovers)

    def new_shard(self, index: int) -> ShardWriter:
        """Begin the shard of range ``index``; its samples are to be added in ascending order."""
        return write_shard(self.folder, self.spec, self.frequency_ranks, index)

    def commit(self, claim: Claim, result: Captured | None, *, provenance: Mapping[str, Any]) -> None:
        assert result is not None  # the leader has one, and only it commits
        if self.scores is not None:
            self.scores.write(claim.index, result.columns, provenance=provenance)
        result.shard.commit()
        self._done.add(claim.index)
        claim.release()

    def finish(self, lock: RunLock) -> Manifest:
        """Write the store's manifest, join the scores, and remove the locks. lock: from `claim_finish`; released here.

        Raises CorruptError if a shard, or a part of the scores, is gone, cut or damaged: run again.
        """
        try:
            if not (self.folder / MANIFEST).exists():
                self._check_indexes()
            if self.scores is not None:
                self.scores.join()
            if not (self.folder / MANIFEST).exists():
                try:
                    finish_store(self.folder, self.spec, self.frequency_ranks, more_files=self._more_files())
                except UsageError as error:
                    raise CorruptError(f"{error}; run again") from error
            for name in filter(_LOCK.fullmatch, self._names() or ()):
                with contextlib.suppress(FileNotFoundError):
                    self._path(int(name[:8]), ".lock").unlink()
        finally:
            lock.__exit__()
        return read_manifest(self.folder / MANIFEST, format=FORMAT, version=READABLE)

    def _check_indexes(self) -> None:
        """Cheap check of shards that other processes wrote: hash each index file again, not the rows.

        Damaged shards lose their manifest, so that they are made again. Raises CorruptError if there are any.
        """
        damaged = []
        for index in range(self.num_ranges):
            manifest = self._read(self._path(index, ".json"))
            if manifest is not None:
                record = manifest.files[1]
                if hash_file(manifest.path.parent / record.name).xxh3_128 != record.xxh3_128:
                    manifest.path.unlink()
                    damaged.append(record.name)
        if damaged:
            raise CorruptError(
                f"{self._ranges}: {len(damaged)} of {self.num_ranges} shards are not what was written, the first is "
                f"{damaged[0]}; they were dropped, run again to make them anew"
            )

    def _more_files(self) -> Sequence[FileRecord]:
        """Write the store's files beside its shards, durably."""
        return ()

    def _read(self, path: Path) -> Manifest | None:
        try:
            manifest = read_shard(self.folder, self.spec, self.frequency_ranks, int(path.stem))
        except FileNotFoundError:
            return None
        if manifest is None or (self.scores is not None and not self.scores.holds(int(path.stem))):
            return None
        return manifest

"""A logits store open for reading: a teacher's sparse targets for the samples of one dataset under one packing.

``store.json`` is the manifest, written when all shards are there; ``order.i32`` the id of each frequency rank;
``shards/`` the shards, each a fixed range of samples. See docs/formats.md.

Axes: ``B`` samples, ``S`` sequence, ``K`` slots for ids.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import OnBytes
from megakd.artefacts.manifest import read_manifest, verify_files
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits import shard as shards
from megakd.logits.codec import Rows, empty_rows
from megakd.logits.shard import REPAIR, Shard
from megakd.logits.spec import FORMAT, MANIFEST, READABLE, SHARDS, StoreSpec, read_ids_of_ranks, shard_path


@dataclass(frozen=True)
class BatchRows:
    """Rows of several samples.

    ids_BSK, log_probs_BSK, entropy_BS: as in ``codec.Rows``.
    has_targets_BS: bool; where it is False all slots are empty and the entropy is 0.
    """

    ids_BSK: NDArray[np.int64]
    log_probs_BSK: NDArray[np.float32]
    entropy_BS: NDArray[np.float32]
    has_targets_BS: NDArray[np.bool_]

    def within(self, vocab_size: int, *, conditional: bool) -> BatchRows:
        """Leave out ids from ``vocab_size`` on, padding that a teacher gave mass to.

        A row that listed nothing else has no targets afterwards.

        conditional: True gives their mass to the other ids in proportion, as the softmax over the true vocabulary
            would. (The mass of padding that is not listed is unknown, and small.)
        """
        beyond_BSK = (self.ids_BSK >= vocab_size) & (self.log_probs_BSK > -np.inf)
        if not beyond_BSK.any():
            return self
        log_probs_BSK = np.where(beyond_BSK, np.float32(-np.inf), self.log_probs_BSK)
        lost_BS = np.where(beyond_BSK, np.exp(self.log_probs_BSK.astype(np.float64)), 0.0).sum(2)
        if conditional:
            kept_BS = np.where(lost_BS < 1, 1 - lost_BS, 1.0)
            log_probs_BSK = (log_probs_BSK - np.log(kept_BS)[:, :, None]).astype(np.float32)
        empty_BS = beyond_BSK.any(2) & (log_probs_BSK == -np.inf).all(2)
        return BatchRows(
            np.where(beyond_BSK, 0, self.ids_BSK),
            np.minimum(log_probs_BSK, np.float32(0)) if conditional else log_probs_BSK,
            self.entropy_BS,
            self.has_targets_BS & ~empty_BS,
        )


class LogitsStore:
    """A store open for reading, from any number of threads.

    dataset, tokenizer, packing, seq_length: the reader's dataset fingerprint, tokenizer hash, packing and sequence
        length, which must be the store's; None is not compared.
    max_open: number of shards that are held open.

    Opening checks the names and sizes of all files; a shard is opened when it is first read.

    Raises UsageError if there is no store, MismatchError for a store of something else, CorruptError for a shard that
    is missing, cut or replaced.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dataset: str | None = None,
        tokenizer: str | None = None,
        packing: str | None = None,
        seq_length: int | None = None,
        max_open: int = 64,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder / MANIFEST, format=FORMAT, version=READABLE)
        self.spec = StoreSpec.of(self.manifest)
        recorded = self.spec.tokenizer or {}
        for what, stored, expected in (
            ("dataset", self.spec.parents["dataset"], dataset),
            ("tokenizer", recorded.get("hash"), tokenizer),
            ("packing", self.spec.packing, packing),
            ("seq_length", self.spec.seq_length, seq_length),
        ):
            if expected is not None and stored != expected:
                raise MismatchError(
                    f"{self.folder}: a store of {what} {stored}, expected {expected}: capture this one's targets, or "
                    "train on what the store was captured from"
                )
        self._shards: list[list[Any] | None] = self.manifest.parameters["shards"]
        self._check_shards()
        self._ids_of_ranks = read_ids_of_ranks(self.manifest)
        self._max_open = max_open
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def has_targets(self, sample_id: int) -> bool:
        """Return whether a sample has targets."""
        shard = self._shard(sample_id)
        return shard is not None and shard.has_targets(sample_id)

    def read(self, sample_id: int, input_ids: NDArray[Any]) -> Rows | None:
        """Read the rows of a sample, one for each of its input ids; None if it has no targets.

        input_ids: the sample's input ids, which must be those that the teacher saw; more may follow.

        Raises MismatchError if the teacher saw other ids, CorruptError if the record is not what was written.
        """
        shard = self._shard(sample_id)
        return None if shard is None else shard.read(sample_id, input_ids)

    def read_batch(
        self, sample_ids: NDArray[np.int64], input_ids_BS: NDArray[Any], *, width: int | None = None
    ) -> BatchRows:
        """Read the rows of several samples into one set of arrays.

        input_ids_BS: the input of the model, with any ids after the end of a shorter sample.
        width: number of slots for ids; None for that of the widest row.

        Raises as `read` does, and UsageError if a row is wider than ``width``.
        """
        records = []
        for sample_id in sample_ids.tolist():
            shard = self._shard(sample_id)
            record = None if shard is None else shard.record(sample_id)
            records.append((sample_id, shard, record))
        sizes = [(0, 0) if shard is None or record is None else shard.size(record) for _, shard, record in records]
        most_ids = max((most for _, most in sizes), default=0)
        if width is not None and most_ids > width:
            raise UsageError(f"{self.folder}: rows of up to {most_ids} ids, asked for {width}")
        batch, seq_length = input_ids_BS.shape
        rows = empty_rows((batch, seq_length), most_ids if width is None else width)
        has_targets = np.zeros((batch, seq_length), np.bool_)
        for at, ((sample_id, shard, record), (num_rows, _)) in enumerate(zip(records, sizes)):
            if shard is not None and record is not None:
                sample_rows = Rows(rows.ids_TK[at], rows.log_probs_TK[at], rows.entropy_T[at])
                shard.decode(sample_id, record, input_ids_BS[at], sample_rows)
            has_targets[at, :num_rows] = True
            rows.ids_TK[at, num_rows:] = 0
            rows.log_probs_TK[at, num_rows:] = -np.inf
            rows.entropy_T[at, num_rows:] = 0
        return BatchRows(rows.ids_TK, rows.log_probs_TK, rows.entropy_T, has_targets)

    def _shard(self, sample_id: int) -> Shard | None:
        """Return the open shard of a sample; None if its range has no targets."""
        if not 0 <= sample_id < self.spec.num_samples:
            raise IndexError(f"sample {sample_id} of {self.spec.num_samples}")
        number = sample_id // self.spec.shard_samples
        entry = self._shards[number]
        if entry is None:
            return None
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        opened = self._open_shard(number, entry)
        with self._lock:
            self._open[number] = opened
            while len(self._open) > self._max_open:  # the file is closed once no thread reads it
                self._open.popitem(last=False)
        return opened

    def _open_shard(self, number: int, entry: list[Any]) -> Shard:
        path = shard_path(self.folder, number)
        shard = Shard(path, self.spec.row_format, self._ids_of_ranks)
        if shard.manifest.fingerprint != entry[0]:
            raise CorruptError(
                f"{path}: shard {shard.manifest.fingerprint}, {MANIFEST} names {entry[0]}: it was replaced; {REPAIR}"
            )
        return shard

    def _check_shards(self) -> None:
        if len(self._shards) != self.spec.num_shards:
            raise CorruptError(
                f"{self.manifest.path}: names {len(self._shards)} shards, expected {self.spec.num_shards}"
            )
        sizes: dict[str, int] = {}
        if (self.folder / SHARDS).is_dir():
            with os.scandir(self.folder / SHARDS) as entries:
                sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        for number, entry in enumerate(self._shards):
            if entry is None:
                continue
            path = shard_path(self.folder, number)
            for suffix, expected in ((".json", None), (".rows", entry[1]), (".index", entry[2])):
                size_bytes = sizes.get(path.stem + suffix)
                if size_bytes is None:
                    raise CorruptError(f"{path.with_suffix(suffix)}: missing; {MANIFEST} names this shard: {REPAIR}")
                if expected is not None and size_bytes != expected:
                    raise CorruptError(
                        f"{path.with_suffix(suffix)}: {size_bytes} bytes on disk, {expected} in {MANIFEST}; the file "
                        f"was cut, replaced or half copied: {REPAIR}"
                    )


def verify_store(folder: str | os.PathLike[str], *, progress: OnBytes | None = None) -> list[str]:
    """Hash every file of a store and return one line for each fault."""
    path = Path(folder) / MANIFEST
    faults = verify_files(path, progress=progress)
    return faults + [fault for _, several in _faults_of_shards(folder, progress) for fault in several]


def drop_damaged(folder: str | os.PathLike[str]) -> list[str]:
    """Remove the shards that are not what was written, and the manifest; return the names of the removed files.

    The command that captured the store then makes them anew and finishes the store. No other process may write it
    meanwhile.
    """
    folder, removed = Path(folder), []
    for shard, faults in _faults_of_shards(folder, None):
        for path in [shard.with_suffix(suffix) for suffix in (".json", ".index", ".rows")] if faults else []:
            if path.exists():
                path.unlink()
                removed.append(str(path.relative_to(folder)))
    (folder / MANIFEST).unlink()
    return [*removed, MANIFEST]


def _faults_of_shards(folder: str | os.PathLike[str], progress: OnBytes | None) -> Iterator[tuple[Path, list[str]]]:
    """Yield the manifest's path of each shard, and the faults of the shard."""
    manifest = read_manifest(Path(folder) / MANIFEST, format=FORMAT, version=READABLE)
    for number, entry in enumerate(manifest.parameters["shards"]):
        if entry is None:
            continue
        shard = shard_path(folder, number)
        try:
            fingerprint = read_manifest(shard, format=shards.FORMAT, version=shards.READABLE).fingerprint
            faults = verify_files(shard, progress=progress)
        except (UsageError, MismatchError, CorruptError) as error:
            yield shard, [str(error)]
            continue
        if fingerprint != entry[0]:
            faults = [f"{shard.name}: shard {fingerprint}, {MANIFEST} names {entry[0]}", *faults]
        yield shard, faults

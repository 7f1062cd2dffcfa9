"""A journal: rows of a logits store in the order in which a model in training met its samples, with the step of each.

Every dataset has a folder. Ranks write segments: shards whose "samples" are records, one after the other. When the run
saves a checkpoint, one manifest names the segments of the steps since the last one, and only then do they count. So a
run that goes on from its checkpoint finds the rows of exactly the steps before it. See docs/formats.md.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter, OnBytes, fsync_directory, hash_file
from megakd.artefacts.manifest import Manifest, read_manifest, verify_files, write_manifest
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.codec import Rows, identity_ranks
from megakd.logits.shard import FORMAT as SEGMENT
from megakd.logits.shard import VERSION as SEGMENT_VERSION
from megakd.logits.shard import Shard, ShardWriter
from megakd.logits.spec import StoreSpec

FORMAT, VERSION = "megakd-logits-journal", 1
SEGMENTS = "segments"
REPAIR = "restore the file, or leave its rows out: 'megakd collect --skip-damaged'"
STEPS = "steps.i32"
"""File of a store that was made from a journal: the step of each sample's rows, -1 for a sample without rows."""
_SEGMENT_TOKENS = 1 << 21  # at most; a rank holds them, one or two hundred megabytes, until they are written
_RUN = "run"
_EIGHT = 8 * "[0-9]"


@dataclass(frozen=True)
class Segment:
    """Entry of a segment in the manifest of its steps."""

    name: str
    fingerprint: str
    file_sizes: tuple[int, int]
    records: FileRecord
    num_records: int


def segment_samples(seq_length: int) -> int:
    """Largest number of records in a segment."""
    return max(1, _SEGMENT_TOKENS // seq_length)


class JournalWriter:
    """Writer of the rows that one rank makes, sample by sample, in the order of the steps.

    writer: the rank's name. num_records: largest number of records in a segment, which the rank holds in memory.
    """

    def __init__(self, folder: Path, spec: StoreSpec, *, writer: str, num_records: int) -> None:
        self._folder, self._spec, self._name_of_writer = folder / SEGMENTS, spec, writer
        self._num_records = max(1, min(num_records, spec.shard_samples))
        self._open: ShardWriter | None = None
        self._name = ""
        self._records: list[tuple[int, int]] = []
        self._segments: list[Segment] = []

    def add(self, sample_id: int, step: int, input_ids: NDArray[Any], rows: Rows) -> None:
        """Add the rows of one sample, made with the weights before ``step``. Raises as ``ShardWriter`` does."""
        if self._open is None:
            self._name = f"{step:08d}-{self._name_of_writer}-{len(self._segments):04d}"
            self._open = ShardWriter(
                self._folder,
                self._name,
                samples=(0, self._num_records),
                row_format=self._spec.row_format,
                frequency_ranks=_ranks(self._spec),
                parameters=self._spec.parameters(_ranks(self._spec)),
                parents=self._spec.parents,
                tokenizer=self._spec.tokenizer,
            )
        self._open.add(len(self._records), input_ids, rows)
        self._records.append((sample_id, step))
        if len(self._records) == self._num_records:
            self._commit_segment()

    def flush(self) -> list[Segment]:
        """Make all rows since the last flush durable, and return their segments, which count after `commit_steps`."""
        self._commit_segment()
        segments, self._segments = self._segments, []
        return segments

    def _commit_segment(self) -> None:
        if self._open is None:
            return
        manifest = self._open.commit()
        with HashingWriter(self._folder / f"{self._name}.records") as writer:
            writer.write(np.array(self._records, "<i8").data)
            records = writer.commit()
        sizes = (manifest.files[0].size_bytes, manifest.files[1].size_bytes)
        segment = Segment(self._name, manifest.fingerprint, sizes, records, len(self._records))
        self._segments.append(segment)
        self._open, self._records = None, []


def commit_steps(
    folder: Path, spec: StoreSpec, segments: Sequence[Segment], *, steps: tuple[int, int], left_out: int = 0
) -> Manifest:
    """Write the manifest that makes the segments of all ranks the rows of some steps, from one process.

    They count once a checkpoint names the manifest's fingerprint.

    steps: the first and the last step. left_out: number of times that a sample was met and got no rows.
    """
    ordered = sorted(segments, key=lambda segment: segment.name)
    return write_manifest(
        folder / f"{steps[0]:08d}-{steps[1]:08d}.json",
        format=FORMAT,
        version=VERSION,
        parameters={
            **spec.parameters(_ranks(spec)),
            "steps": list(steps),
            "segments": [[segment.name, segment.fingerprint, *segment.file_sizes] for segment in ordered],
            "num_records": sum(segment.num_records for segment in ordered),
            "left_out": left_out,
        },
        parents=spec.parents,
        tokenizer=spec.tokenizer,
        files=[replace(segment.records, name=f"{SEGMENTS}/{segment.records.name}") for segment in ordered],
    )


def training_spec(spec: StoreSpec, folder: Path, save: str | os.PathLike[str]) -> StoreSpec:
    """Tie the spec of a journal in ``folder`` to the run that writes it, by the relative path of the run's ``save``."""
    run = os.path.relpath(os.path.realpath(save), os.path.realpath(folder))
    return replace(spec, parents={**spec.parents, "model": "in training"}, details={**spec.details, _RUN: run})


def run_folder(folder: Path) -> str:
    """Path, relative to ``folder``, of the checkpoints of the run that writes the journal there.

    Raises UsageError if there is no journal.
    """
    paths = manifest_paths(folder)
    if not paths:
        raise UsageError(f"{folder}: no journal here: 'megakd train --logits-save-dir' writes one as it saves")
    return str(read_manifest(paths[0], format=FORMAT, version=VERSION, check_files=False).parameters["details"][_RUN])


def check_journal(folder: Path, spec: StoreSpec) -> None:
    """Raise MismatchError if the folder holds rows of another kind or run. Writes nothing."""
    for manifest in _manifests(folder):
        _check_spec(manifest, spec, "give another --logits-save-dir")


def cut_back(folder: Path, step: int, counted: Collection[str] | None = None) -> list[tuple[int, int]]:
    """Remove the rows that are not in the past of a run that goes on from the checkpoint of ``step``.

    These are the rows after the checkpoint, whose steps come again, and those of another branch. Returns the first and
    the last step of each removed manifest. Called from one process.

    counted: fingerprints that the checkpoint names; None for a checkpoint older than such names.
    """
    kept: set[str] = set()
    removed: list[tuple[int, int]] = []
    for manifest in _manifests(folder):
        first, last = manifest.parameters["steps"]
        if last > step or (counted is not None and manifest.fingerprint not in counted):
            manifest.path.unlink()
            removed.append((first, last))
        else:
            kept.update(segment[0] for segment in manifest.parameters["segments"])
    if folder.exists():
        fsync_directory(folder)
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder / SEGMENTS):
            if entry.name.split(".")[0] not in kept:
                os.unlink(entry)
    return removed


class Journal:
    """A journal open for reading.

    from_step: first step whose rows are read.
    counted: fingerprints that the run's checkpoint names; manifests with others are left out. None takes all.
    skip_damaged: True to leave out segments that are not what was written.
    max_open: number of segments that are held open.

    Raises UsageError if there is no journal, MismatchError for rows of several kinds or runs, CorruptError for steps
    that are there twice.
    """

    def __init__(
        self,
        folder: Path,
        *,
        from_step: int = 0,
        counted: Collection[str] | None = None,
        skip_damaged: bool = False,
        max_open: int = 256,
    ) -> None:
        all_manifests = list(_manifests(folder, check_files=not skip_damaged))
        manifests = [entry for entry in all_manifests if counted is None or entry.fingerprint in counted]
        if not all_manifests:
            raise UsageError(f"{folder}: no journal here: 'megakd train --logits-save-dir' writes one as it saves")
        if not manifests:
            raise UsageError(f"{folder}: the run's checkpoint names none of the rows here: let the run go on and save")
        self.folder, self._from_step = folder, from_step
        self.not_counted = [entry.path.stem for entry in all_manifests if entry not in manifests]
        """Names of manifests whose steps were left out because the checkpoint does not name them."""
        self.spec = StoreSpec.of(manifests[0])
        for before, manifest in itertools.pairwise(manifests):
            _check_spec(manifest, self.spec, "a store is made from rows of one kind")
            if manifest.parameters["steps"][0] <= before.parameters["steps"][1]:
                raise CorruptError(
                    f"{manifest.path}: steps that {before.path.name} has too; one of them is not this run's"
                )
        self._manifests = [entry for entry in manifests if entry.parameters["steps"][1] >= from_step]
        self._segments = [segment for entry in self._manifests for segment in entry.parameters["segments"]]
        self.left_out = sum(int(entry.parameters["left_out"]) for entry in self._manifests)
        """Number of times that a sample was met and got no rows, because its logits were not finite."""
        self.damaged: list[str] = []
        """Names of segments that were left out because they are not what was written."""
        if skip_damaged:
            self.damaged = [name for entry in self._manifests for name in faults_of_segments(entry)]
        names = [entry.fingerprint for entry in self._manifests] + self.damaged
        self.fingerprint = xxhash.xxh3_128_hexdigest("\n".join(names).encode())
        """Hash of the fingerprints of the manifests, and of the names of segments left out as damaged."""
        self._ids_of_ranks = _ranks(self.spec)  # the identity, which is its own inverse
        self._max_open = max_open
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def latest(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the last step at which each sample was met (int32) and the place of its rows for `read` (int64).

        ``[num_samples]`` each; -1 for samples that were not met. Raises CorruptError for damaged records.
        """
        steps = np.full(self.spec.num_samples, -1, np.int32)
        places = np.full(self.spec.num_samples, -1, np.int64)
        segment = -1
        for manifest in self._manifests:
            parts = [np.empty((0, 3), np.int64)]
            for record in manifest.files:
                segment += 1
                if self._segments[segment][0] in self.damaged:
                    continue
                ids_steps = np.fromfile(self.folder / record.name, "<i8").reshape(-1, 2)
                if xxhash.xxh3_128_hexdigest(ids_steps.data) != record.xxh3_128:
                    raise CorruptError(f"{self.folder / record.name}: it is not what was written: {REPAIR}")
                numbers = np.arange(len(ids_steps)) + (segment << 32)
                parts.append(np.column_stack((ids_steps, numbers)))
            rows = np.concatenate(parts)
            rows = rows[rows[:, 1] >= self._from_step]
            rows = rows[np.lexsort((-rows[:, 2], rows[:, 1]))]  # several rows of one step: the first
            steps[rows[:, 0]], places[rows[:, 0]] = (
                rows[:, 1],
                rows[:, 2],
            )  # several steps of one sample: the last assignment stays
        return steps, places

    def read(self, place: int, input_ids: NDArray[Any]) -> Rows:
        """Read the rows at a place. input_ids: the ids that the model saw.

        Raises MismatchError for other ids, CorruptError for a segment that is missing or not what was written.
        """
        number, record = place >> 32, place & 0xFFFFFFFF
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = self._open_segment(*self._segments[number])
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        rows = shard.read(record, input_ids)
        if rows is None:
            raise CorruptError(f"{shard.path}: record {record} is empty")
        return rows

    def _open_segment(self, name: str, fingerprint: str, *sizes: int) -> Shard:
        path = self.folder / SEGMENTS / f"{name}.json"
        try:
            shard = Shard(path, self.spec.row_format, self._ids_of_ranks, repair=REPAIR)
        except UsageError as error:
            raise CorruptError(f"{path}: missing; the manifest of its steps names it: {REPAIR}") from error
        if shard.manifest.fingerprint != fingerprint:
            raise CorruptError(f"{path}: segment {shard.manifest.fingerprint}, {fingerprint} was written: {REPAIR}")
        return shard


def faults_of_segments(manifest: Manifest, *, progress: OnBytes | None = None) -> dict[str, list[str]]:
    """Hash every file of the segments of some steps; return name -> faults of each segment that is damaged."""
    damaged: dict[str, list[str]] = {}
    folder = manifest.path.parent
    for (name, fingerprint, *_), record in zip(manifest.parameters["segments"], manifest.files):
        path = folder / SEGMENTS / f"{name}.json"
        faults: list[str] = []
        try:
            if hash_file(folder / record.name, progress=progress) != replace(record, name=Path(record.name).name):
                faults.append(f"{record.name} is not what was written")
            segment = read_manifest(path, format=SEGMENT, version=SEGMENT_VERSION)
            if segment.fingerprint != fingerprint:
                faults.append(f"{path.name}: segment {segment.fingerprint}, {fingerprint} was written")
            faults += verify_files(path, progress=progress)
        except (OSError, UsageError, MismatchError, CorruptError) as error:
            faults.append(str(error))
        if faults:
            damaged[name] = faults
    return damaged


def manifest_paths(folder: Path) -> list[Path]:
    """Paths of the manifests of a journal, in the order of their steps; empty if there is no journal."""
    return sorted(folder.glob(f"{_EIGHT}-{_EIGHT}.json"))


def _manifests(folder: Path, *, check_files: bool = True) -> Iterator[Manifest]:
    for path in manifest_paths(folder):
        yield read_manifest(path, format=FORMAT, version=VERSION, check_files=check_files)


def _check_spec(manifest: Manifest, spec: StoreSpec, remedy: str) -> None:
    recorded = StoreSpec.of(manifest)
    values = ((name, getattr(recorded, name), getattr(spec, name)) for name in StoreSpec.__dataclass_fields__)
    wrong = [
        f"{name} {stored} there, {expected} here"
        for name, stored, expected in values
        if name != "tokenizer" and _plain(stored) != _plain(expected)
    ]
    if wrong:
        raise MismatchError(f"{manifest.path}: rows of another kind or run: {'; '.join(wrong)}: {remedy}")


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value


def _ranks(spec: StoreSpec) -> NDArray[np.int32]:
    """Identity ranks: a journal is written in passing and need not be as small as a store."""
    return identity_ranks(spec.vocab_size)

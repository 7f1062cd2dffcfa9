"""Selection: a folder with the ids of the samples of a dataset that are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter, fsync_directory, hash_file
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.data.indexed.dataset import IndexedDataset
from megakd.errors import CorruptError, MismatchError

FORMAT, VERSION = "megakd-selection", 1
MANIFEST, IDS = "selection.json", "ids.i64"


class Selection:
    """Selection on disk, opened.

    ids: ``[n]`` int64, ascending, without duplicates; a read-only view of the mapped file.

    Raises UsageError if the folder has no selection, CorruptError for damaged files, MismatchError if the selection was
    made for another dataset than the one with the fingerprint ``expect_dataset``.
    """

    def __init__(self, folder: str | os.PathLike[str], *, expect_dataset: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder / MANIFEST, format=FORMAT, version=VERSION)
        parameters = self.manifest.parameters
        self.dataset = self.manifest.parents["dataset"]
        """Fingerprint of the dataset."""
        if expect_dataset is not None and self.dataset != expect_dataset:
            raise MismatchError(
                f"{self.folder}: a selection from dataset {self.dataset}, expected dataset {expect_dataset}: "
                "select from this dataset's scores"
            )
        self.packing: str = parameters["packing"]
        self.seq_length = int(parameters["seq_length"])
        self.num_samples = int(parameters["num_samples"])
        """Samples of the dataset, kept or not."""
        self.ids: NDArray[np.int64] = np.zeros(0, np.int64)
        if self.manifest.files[0].size_bytes:  # an empty file cannot be mapped
            self.ids = np.memmap(self.folder / IDS, "<i8", "r")
            if not 0 <= int(self.ids[0]) <= int(self.ids[-1]) < self.num_samples:
                raise CorruptError(
                    f"{self.folder / IDS}: ids from {self.ids[0]} to {self.ids[-1]} of {self.num_samples} samples"
                )

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def check(self, dataset: IndexedDataset, *, packing: str, seq_length: int, num_samples: int | None = None) -> None:
        """Raise MismatchError unless it was made for these samples. num_samples: None if not known yet."""
        for name, value, expected in (
            ("dataset", dataset.fingerprint, self.dataset),
            ("packing", packing, self.packing),
            ("seq_length", seq_length, self.seq_length),
            ("number of samples", num_samples, self.num_samples),
        ):
            if value is not None and value != expected:
                raise MismatchError(
                    f"{self.folder}: selected from {name} {expected}, but {dataset.prefix} has {name} {value}; use the "
                    f"{name} that was scored, or score and select anew"
                )

    def __len__(self) -> int:
        return len(self.ids)


class SelectionWriter:
    """Writer of a selection, in pieces of ascending ids; no file has its final name before `finish`.

    A context manager: without `finish`, leaving it removes what was written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.num_kept = 0
        self._writer = HashingWriter(self.folder / IDS)
        self._last = -1

    def append(self, ids: NDArray[np.int64]) -> None:
        """Add ids, each larger than all before. Raises ValueError otherwise."""
        if not len(ids):
            return
        if int(ids[0]) <= self._last or bool((ids[1:] <= ids[:-1]).any()):
            raise ValueError(f"{self.folder}: ids of a selection must ascend (after {self._last}: {ids[:3]} ...)")
        self._last = int(ids[-1])
        self._writer.write(np.ascontiguousarray(ids, dtype="<i8").data)
        self.num_kept += len(ids)

    def finish(
        self,
        *,
        packing: str,
        seq_length: int,
        num_samples: int,
        dataset: str,
        rule: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Make the selection durable, the manifest last.

        num_samples: samples of the dataset, kept or not. dataset: fingerprint of the dataset. rule: settings and
        results of the choice. parents: fingerprints of the other artefacts that it was made from, such as scores.
        """
        if self._last >= num_samples:
            raise ValueError(f"{self.folder}: id {self._last} of {num_samples} samples")
        (self.folder / MANIFEST).unlink(missing_ok=True)  # an older one does not describe the new ids
        fsync_directory(self.folder)
        return write_manifest(
            self.folder / MANIFEST,
            format=FORMAT,
            version=VERSION,
            parameters={
                "packing": packing,
                "seq_length": seq_length,
                "num_samples": num_samples,
                "num_kept": self.num_kept,
                "rule": rule,
            },
            parents={**(parents or {}), "dataset": dataset},
            tokenizer=tokenizer,
            files=[self._writer.commit()],
        )

    def wrote(self, manifest: Manifest) -> bool:
        """Return whether the ids written so far are those of a finished selection, by their hash."""
        return hash_file(self._writer.temporary).xxh3_128 == manifest.files[0].xxh3_128

    def abort(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        self._writer.abort()

    def __enter__(self) -> SelectionWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()

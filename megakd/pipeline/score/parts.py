"""Unfinished scores: ranges of samples that are committed one by one, and joined by the last process.

`work.ranges` shares them out. ``parts/R.part`` holds the columns of range *R*, one after the other.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.manifest import Manifest, read_manifest, verify_files, write_manifest
from megakd.artefacts.run_lock import RunLock
from megakd.data.scores import artefact as scores
from megakd.data.scores.artefact import DTYPES, PER_TOKEN, finish_scores
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.frozen.output_folder import check_output
from megakd.work.ranges import Claim, RangeWork

FORMAT, VERSION = "megakd-scores-part", 1
_OPTIONAL = ("predicts", "sampled")  # parameters whose absence is compared too
_OF_A_RANGE = re.compile(r"\.?[0-9]{8}\.")


class Parts(RangeWork[Mapping[str, NDArray[Any]]]):
    """Scores in ``folder``, finished or unfinished.

    columns: file names of the wanted columns, from ``megakd.data.scores.artefact``.
    parameters, parents, tokenizer: identity of the scores, for the manifests. Scores in the folder that differ in any
        of it are refused with a MismatchError.
    ids: ascending, the samples that are scored; None: all.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_samples: int,
        range_samples: int,
        columns: tuple[str, ...],
        parameters: Mapping[str, Any],
        parents: Mapping[str, str],
        tokenizer: Mapping[str, Any] | None,
        ids: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(folder, folder / "parts", num_samples=num_samples, range_samples=range_samples, ids=ids)
        self.columns = columns
        self._seq_length = int(parameters["seq_length"])
        self._parameters, self._parents, self._tokenizer = dict(parameters), dict(parents), tokenizer

    def check_all(self, flag: str = "--output") -> None:
        """Raise MismatchError if the folder holds other scores than these, finished or not. Writes nothing.

        flag: names the folder in messages. Raises UsageError if something else lies there.
        """
        check_output(self.folder, flag, scores.MANIFEST)
        if not self.finished():
            for path in sorted(self._ranges.glob("[0-9]*.json")):
                self._read(path)

    def finished(self) -> bool:
        """Return whether the joined scores are there. Raises UsageError if they lack a wanted column."""
        path = self.folder / scores.MANIFEST
        if not path.exists():
            return False
        manifest = read_manifest(path, format=scores.FORMAT, version=scores.VERSION)
        self._check_identity(manifest)
        present = {record.name for record in manifest.files}
        if not set(self.columns) <= present:
            raise UsageError(
                f"{path}: finished without {', '.join(sorted(set(self.columns) - present))}; give another --output, or "
                f"remove {self.folder} to score anew"
            )
        return True

    @property
    def has_leftovers(self) -> bool:
        """True if the folder holds parts, which finished scores no longer need."""
        names = self._names()
        return names is not None and (not names or any(map(_OF_A_RANGE.match, names)))

    def commit(self, claim: Claim, result: Mapping[str, NDArray[Any]], *, provenance: Mapping[str, Any]) -> None:
        """Make the result of a range durable, and release the claim. result: the wanted columns over its samples."""
        self.write(claim.index, result, provenance=provenance)
        claim.release()

    def write(self, index: int, result: Mapping[str, NDArray[Any]], *, provenance: Mapping[str, Any]) -> None:
        """Make the result of range ``index`` durable. The caller has claimed it, here or in another artefact."""
        self._ranges.mkdir(parents=True, exist_ok=True)
        start, stop = self.bounds(index)
        with HashingWriter(self._path(index, ".part")) as writer:
            for name in self.columns:
                array = np.ascontiguousarray(result[name], dtype=DTYPES[name])
                assert array.size == (stop - start) * self._positions(name), (name, array.shape)
                writer.write(array.data)
            files = [writer.commit()]
        write_manifest(
            self._path(index, ".json"),
            format=FORMAT,
            version=VERSION,
            parameters={
                **self._parameters,
                "num_samples": self.num_samples,
                "range_samples": self.range_samples,
                "range": [start, stop],
                "columns": list(self.columns),
                "computed": dict(provenance),
            },
            parents=self._parents,
            tokenizer=self._tokenizer,
            files=files,
        )
        self._done.add(index)

    def finish(self, lock: RunLock) -> Manifest:
        """Join the parts, unless that is done, and remove them. lock: from `claim_finish`; released here.

        Raises CorruptError for parts that differ from what was written; their ranges count as not done afterwards.
        """
        try:
            self.join()
        finally:
            lock.__exit__()
        return read_manifest(self.folder / scores.MANIFEST, format=scores.FORMAT, version=scores.VERSION)

    def join(self) -> None:
        """Join the parts and remove them; the caller holds the right to finish."""
        if not self.finished():
            self._join()
        self._remove_parts()

    def holds(self, index: int) -> bool:
        """Return whether range ``index`` is finished, or all ranges are joined."""
        return self._is_done(index) or self.finished()

    def _join(self) -> None:
        manifests = [self._read(self._path(index, ".json")) for index in range(self.num_ranges)]
        damaged = [
            index
            for index, manifest in enumerate(manifests)
            if manifest is None or verify_files(self._path(index, ".json"))
        ]
        for index in damaged:
            self._path(index, ".json").unlink(missing_ok=True)
        if damaged:
            raise CorruptError(
                f"{self._ranges}: {len(damaged)} of {self.num_ranges} ranges are not what was written, the first is "
                f"{self._path(damaged[0], '.part').name}; they were dropped, run again to score them anew"
            )
        distinct = {str(sorted(m.parameters["computed"].items())): m.parameters["computed"] for m in manifests if m}
        finish_scores(
            self.folder,
            {name: self._pieces(name) for name in self.columns},
            num_samples=self.num_samples,
            parameters={**self._parameters, "computed": [distinct[key] for key in sorted(distinct)]},
            parents=self._parents,
            tokenizer=self._tokenizer,
        )

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield the values of one column, range by range."""
        before = self.columns[: self.columns.index(name)]
        for index in range(self.num_ranges):
            count = self._num_samples(index)
            offset = sum(count * self._positions(column) * np.dtype(DTYPES[column]).itemsize for column in before)
            yield np.fromfile(
                self._path(index, ".part"), DTYPES[name], count=count * self._positions(name), offset=offset
            )

    def _remove_parts(self) -> None:
        for _ in range(20):  # a process that has not seen yet that all is joined may add a lock file meanwhile
            for name in filter(_OF_A_RANGE.match, self._names() or ()):  # other files are the user's
                (self._ranges / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                self._ranges.rmdir()
            if not self.has_leftovers:
                return
            time.sleep(0.1)

    def _read(self, path: Path) -> Manifest | None:
        """The manifest of a finished range; None where there is none, or its file is missing or cut."""
        if not path.exists():
            return None
        try:
            manifest = read_manifest(path, format=FORMAT, version=VERSION)
        except (UsageError, CorruptError, FileNotFoundError):  # FileNotFoundError: another process is removing it
            return None
        self._check_identity(manifest)
        return manifest

    def _check_identity(self, manifest: Manifest) -> None:
        expected = {**self._parameters, "num_samples": self.num_samples}
        expected |= {key: self._parameters.get(key) for key in _OPTIONAL}
        if manifest.format == FORMAT:
            expected |= {"range_samples": self.range_samples, "columns": list(self.columns)}
        if wrong := manifest.differences(expected, self._parents, self._tokenizer):
            raise MismatchError(
                f"{manifest.path} holds other scores than these: {'; '.join(wrong)}. Give another --output, or remove "
                f"{self.folder} to score anew"
            )

    def _positions(self, name: str) -> int:
        return self._seq_length if name in PER_TOKEN else 1

    def _num_samples(self, index: int) -> int:
        start, stop = self.bounds(index)
        return stop - start

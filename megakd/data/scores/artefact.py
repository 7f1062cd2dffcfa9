"""Scores on disk: one model's log-probability of every sample of one dataset, in raw arrays by sample id."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.errors import CorruptError, MismatchError

FORMAT, VERSION = "megakd-scores", 1
MANIFEST = "scores.json"
LOG_PROBS, COUNTS = "log_probs.f32", "counts.i32"
TOKEN_LOG_PROBS, TOKEN_ENTROPIES = "token_log_probs.f16", "token_entropies.f16"
DTYPES = {LOG_PROBS: "<f4", COUNTS: "<i4", TOKEN_LOG_PROBS: "<f2", TOKEN_ENTROPIES: "<f2"}
PER_TOKEN = (TOKEN_LOG_PROBS, TOKEN_ENTROPIES)
"""Optional columns, with one value for each position of a sample."""
UNSCORED = {LOG_PROBS: np.nan, COUNTS: 0, TOKEN_LOG_PROBS: np.nan, TOKEN_ENTROPIES: np.nan}
"""Column -> its value for a sample that was not scored, where only a part of the samples was."""


class Scores:
    """A folder of scores, its arrays read-only views of the mapped files.

    log_probs: ``[num_samples]`` fp32, nats: the sum of log p over the scored tokens of each sample.
    counts: ``[num_samples]`` int32: the number of scored tokens.
    sampled: ``fraction``, ``seed`` and ``num_scored`` where only a part of the samples was scored; the rest have NaN
        and a count of 0. None: all were scored.
    token_log_probs, token_entropies: ``[num_samples, seq_length]`` fp16, nats, NaN where a position is not scored;
        None if the scores were made without them. Position *j* is about the token after token *j* of the sample.

    Raises UsageError for a folder without scores, CorruptError for incomplete files, MismatchError if
    ``expect_dataset`` is not the fingerprint of the dataset that was scored.
    """

    def __init__(self, folder: str | os.PathLike[str], *, expect_dataset: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder / MANIFEST, format=FORMAT, version=VERSION)
        dataset = self.manifest.parents["dataset"]
        if expect_dataset is not None and dataset != expect_dataset:
            raise MismatchError(
                f"{self.folder}: scores of dataset {dataset}, expected {expect_dataset}: score this dataset anew"
            )
        self.num_samples = int(self.manifest.parameters["num_samples"])
        self.sampled: Mapping[str, Any] | None = self.manifest.parameters.get("sampled")
        columns = {record.name: self._column(record.name) for record in self.manifest.files if record.name in DTYPES}
        if LOG_PROBS not in columns or COUNTS not in columns:
            raise CorruptError(f"{self.manifest.path}: names {sorted(columns)}, expected {LOG_PROBS} and {COUNTS}")
        self.log_probs: NDArray[np.float32] = columns[LOG_PROBS]
        self.counts: NDArray[np.int32] = columns[COUNTS]
        self.token_log_probs: NDArray[np.float16] | None = columns.get(TOKEN_LOG_PROBS)
        self.token_entropies: NDArray[np.float16] | None = columns.get(TOKEN_ENTROPIES)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def _column(self, name: str) -> NDArray[Any]:
        positions = int(self.manifest.parameters["seq_length"]) if name in PER_TOKEN else 1
        size_bytes = self.num_samples * positions * np.dtype(DTYPES[name]).itemsize
        found_bytes = os.path.getsize(self.folder / name)
        if found_bytes != size_bytes:
            raise CorruptError(
                f"{self.folder / name}: {found_bytes} bytes, {self.num_samples} samples take {size_bytes}"
            )
        shape = (self.num_samples, positions) if name in PER_TOKEN else (self.num_samples,)
        if size_bytes == 0:  # an empty file cannot be mapped
            return np.empty(shape, DTYPES[name])
        return np.memmap(self.folder / name, DTYPES[name], "r", shape=shape)


def write_scores(
    folder: str | os.PathLike[str],
    log_probs: NDArray[np.float32],
    counts: NDArray[np.int32],
    *,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
) -> Manifest:
    """Write scores that fit in memory; ``num_samples`` is added to the parameters.

    parameters: ``packing``, ``seq_length``, ``mask_policy``, ``precision``, and anything else that the scores depend
    on. parents: fingerprints of ``dataset`` and ``model``.
    """
    return finish_scores(
        folder,
        {LOG_PROBS: [log_probs], COUNTS: [counts]},
        num_samples=len(log_probs),
        parameters=parameters,
        parents=parents,
        tokenizer=tokenizer,
    )


def finish_scores(
    folder: str | os.PathLike[str],
    columns: Mapping[str, Iterable[NDArray[Any]]],
    *,
    num_samples: int,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
) -> Manifest:
    """Write scores of any size, each column block by block in the order of the samples; the manifest comes last.

    columns: file name -> blocks of its values; ``LOG_PROBS`` and ``COUNTS`` at least. The remaining arguments are
    those of ``write_scores``.

    Raises NoSpaceError on a full disk, UsageError if another process writes the same files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    records = []
    for name, pieces in columns.items():
        with HashingWriter(folder / name) as writer:
            for piece in pieces:
                writer.write(np.ascontiguousarray(piece, dtype=DTYPES[name]).data)
            records.append(writer.commit())
        positions = int(parameters["seq_length"]) if name in PER_TOKEN else 1
        assert records[-1].size_bytes == num_samples * positions * np.dtype(DTYPES[name]).itemsize, name
    return write_manifest(
        folder / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**parameters, "num_samples": num_samples},
        parents=parents,
        tokenizer=tokenizer,
        files=records,
    )

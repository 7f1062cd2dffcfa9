"""Scores on disk: what one model says about every sample of one dataset, as raw arrays addressed by sample id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.durable import HashingWriter
from megakd.errors import MismatchError
from megakd.manifest import Manifest, read_manifest, write_manifest

FORMAT, VERSION = "megakd-scores", 1
MANIFEST = "scores.json"
LOG_PROBS, COUNTS = "log_probs.f32", "counts.i32"


class Scores:
    """A folder of scores, its arrays read-only views of the mapped files.

    log_probs: ``[num_samples]`` fp32, nats: the sum of log p over the scored tokens of each sample.
    counts: ``[num_samples]`` int32: how many tokens that were.

    Raises UsageError where there are none, CorruptError for files that are not whole, MismatchError if
    ``expect_dataset`` is not the fingerprint of the dataset that was scored.
    """

    def __init__(self, folder: str | os.PathLike[str], *, expect_dataset: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder / MANIFEST, format=FORMAT, version=VERSION)
        dataset = self.manifest.parents["dataset"]
        if expect_dataset is not None and dataset != expect_dataset:
            raise MismatchError(
                f"{self.folder}: scores of dataset {dataset}, expected dataset {expect_dataset}: score this dataset anew"
            )
        self.num_samples = int(self.manifest.parameters["num_samples"])
        self.log_probs: NDArray[np.float32] = np.memmap(self.folder / LOG_PROBS, "<f4", "r", shape=(self.num_samples,))
        self.counts: NDArray[np.int32] = np.memmap(self.folder / COUNTS, "<i4", "r", shape=(self.num_samples,))

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint


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

    parameters: ``packing``, ``seq_length``, ``mask_policy``, ``precision``, and what else made the scores what they
    are. parents: ``dataset`` and ``model``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, array, dtype in ((LOG_PROBS, log_probs, "<f4"), (COUNTS, counts, "<i4")):
        with HashingWriter(folder / name) as writer:
            writer.write(np.ascontiguousarray(array, dtype=dtype).data)
            records.append(writer.commit())
    return write_manifest(
        folder / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**parameters, "num_samples": len(log_probs)},
        parents=parents,
        tokenizer=tokenizer,
        files=records,
    )

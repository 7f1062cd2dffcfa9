"""A proxy on disk, read without torch: a tuned model's checkpoint, and the head that makes one number of a sample."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megakd.errors import CorruptError, MismatchError
from megakd.manifest import Manifest, read_manifest
from megakd.model.record import CheckpointRecord, read_record

FORMAT, VERSION = "megakd-proxy", 1
MANIFEST, HEAD, HELD_OUT = "proxy.json", "head.f32", "held_out.csv"


@dataclass(frozen=True)
class Proxy:
    """What ``megakd proxy`` left in ``folder``."""

    folder: Path
    manifest: Manifest
    record: CheckpointRecord
    """The tuned model."""
    head: NDArray[np.float32]
    """``[hidden_size + 1]``: weights over the mean hidden state, then the bias; gives nats a token."""

    def check_samples(self, **asked: object) -> None:
        """Raise MismatchError where ``packing``, ``seq_length`` or ``mask_policy`` are not those it was fitted on."""
        for key, value in asked.items():
            own = self.manifest.parameters[key]
            if own != value:
                raise MismatchError(
                    f"--proxy {self.folder}: fitted on samples with {key} {own}, asked for {key} {value}: its "
                    f"predictions are of such samples; add --{key.replace('_', '-')} {own}"
                )


def read_proxy(folder: str | os.PathLike[str]) -> Proxy:
    """Open a proxy.

    Raises UsageError where there is none, CorruptError for files that are not whole, MismatchError where its
    checkpoint is another one.
    """
    path = Path(folder)
    manifest = read_manifest(path / MANIFEST, format=FORMAT, version=VERSION)
    record = read_record(path, int(manifest.parameters["iteration"]), role="--proxy")
    expected = manifest.parents["model"]
    if record.fingerprint != expected:
        raise MismatchError(
            f"{record.path}: fingerprint {record.fingerprint}, {manifest.path} was made with {expected}"
        )
    head = np.fromfile(path / HEAD, "<f4")
    if len(head) != record.shape.hidden_size + 1:
        raise CorruptError(f"{path / HEAD}: {len(head)} numbers, expected {record.shape.hidden_size + 1}")
    return Proxy(path, manifest, record, head)

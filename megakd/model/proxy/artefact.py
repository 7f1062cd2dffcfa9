"""A proxy on disk, read without torch: a tuned model's checkpoint, and the head that makes one number of a sample."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.manifest import HashingWriter, Manifest, faults_in_blocks, read_manifest, write_manifest
from megakd.errors import CorruptError, MismatchError
from megakd.model.checkpoint.record import CheckpointRecord, read_record

FORMAT, VERSION = "megakd-proxy", 1
MANIFEST, HEAD, HELD_OUT = "proxy.json", "head.f32", "held_out.csv"


@dataclass(frozen=True)
class Proxy:
    """Proxy in ``folder``, made by ``megakd proxy``."""

    folder: Path
    manifest: Manifest
    record: CheckpointRecord
    """The tuned model."""
    head: NDArray[np.float32]
    """``[hidden_size + 1]``: weights over the mean hidden state, then the bias; gives nats a token."""

    def check_samples(self, **asked: object) -> None:
        """Raise MismatchError unless ``packing``, ``seq_length`` and ``mask_policy`` are those of the fit."""
        for key, value in asked.items():
            fitted = self.manifest.parameters[key]
            if fitted != value:
                raise MismatchError(
                    f"--proxy {self.folder}: fitted on samples with {key} {fitted}, asked for {key} {value}: its "
                    f"predictions are of such samples; add --{key.replace('_', '-')} {fitted}"
                )


def read_proxy(folder: str | os.PathLike[str]) -> Proxy:
    """Open a proxy.

    Raises UsageError if the folder has none, CorruptError for damaged files, MismatchError if the checkpoint in it is
    not the proxy's.
    """
    path = Path(folder)
    manifest = read_manifest(path / MANIFEST, format=FORMAT, version=VERSION)
    if faults := faults_in_blocks(manifest):
        raise CorruptError(f"--proxy {path} is damaged: {faults[0]}; fit it anew with 'megakd proxy'")
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


def write_proxy(
    folder: str | os.PathLike[str],
    head: NDArray[np.float64],
    held_out: Mapping[str, NDArray[Any]],
    *,
    record: CheckpointRecord,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
) -> Manifest:
    """Write the files that make a proxy of the checkpoint ``record`` in the folder, the manifest last.

    head: ``[hidden_size + 1]``, stored as fp32. held_out: columns of equal length, for the CSV.
    """
    path = Path(folder)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(held_out)
    writer.writerows(zip(*(column.tolist() for column in held_out.values())))
    files = []
    for name, content in ((HEAD, head.astype("<f4").tobytes()), (HELD_OUT, text.getvalue().encode())):
        with HashingWriter(path / name) as stream:
            stream.write(content)
            files.append(stream.commit())
    return write_manifest(
        path / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={**parameters, "iteration": record.iteration, "seq_length": record.seq_length},
        parents={**parents, "model": record.fingerprint},
        tokenizer=record.tokenizer,
        files=files,
    )

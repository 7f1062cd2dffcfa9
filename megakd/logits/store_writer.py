"""Writing of a logits store: shards, by any number of processes, then the one manifest that makes them a store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter
from megakd.artefacts.manifest import Manifest, read_manifest, write_manifest
from megakd.errors import CorruptError, UsageError
from megakd.logits import shard as shards
from megakd.logits.codec import ROWS_FOR_CODES, invert
from megakd.logits.shard import ShardWriter
from megakd.logits.spec import FORMAT, MANIFEST, ORDER, VERSION, StoreSpec, check_identity, shard_path


def write_shard(
    folder: str | os.PathLike[str],
    spec: StoreSpec,
    frequency_ranks: NDArray[np.int32],
    shard: int,
    *,
    rows_for_codes: int = ROWS_FOR_CODES,
) -> ShardWriter:
    """Open the writer of one shard: `add` the samples that have targets, in rising order, then `commit`.

    frequency_ranks: ``[V]`` int32, equal for all shards of a store. rows_for_codes: see ``codec.ROWS_FOR_CODES``.

    Raises UsageError for ranks of another vocabulary than the spec's.
    """
    if len(frequency_ranks) != spec.vocab_size:
        raise UsageError(f"{len(frequency_ranks)} ranks for a vocabulary of {spec.vocab_size}")
    path = shard_path(folder, shard)
    return ShardWriter(
        path.parent,
        path.stem,
        samples=spec.samples_of(shard),
        row_format=spec.row_format,
        frequency_ranks=frequency_ranks,
        parameters=spec.parameters(frequency_ranks),
        parents=spec.parents,
        tokenizer=spec.tokenizer,
        rows_for_codes=rows_for_codes,
    )


def read_shard(
    folder: str | os.PathLike[str], spec: StoreSpec, frequency_ranks: NDArray[np.int32], shard: int
) -> Manifest | None:
    """Read the manifest of a whole shard; None if there is none, or a file of it is missing or cut.

    Raises MismatchError, with the differences, for a shard of another store.
    """
    path = shard_path(folder, shard)
    if not path.exists():
        return None
    try:
        manifest = read_manifest(path, format=shards.FORMAT, version=shards.READABLE)
    except CorruptError:
        return None
    parameters = spec.parameters(frequency_ranks) | {"samples": list(spec.samples_of(shard))}
    check_identity(manifest, parameters, spec, "is a shard of another store")
    return manifest


def finish_store(
    folder: str | os.PathLike[str],
    spec: StoreSpec,
    frequency_ranks: NDArray[np.int32],
    *,
    present: Iterable[int] | None = None,
    more_files: Sequence[FileRecord] = (),
) -> Manifest:
    """Write the manifest that makes the shards a store, from one process. Their records are not read again.

    present: the shards that must be there, all by default; the ranges of the others have no targets.
    more_files: records of other durable files in the folder that belong to the store.

    Raises UsageError for a shard that is missing or not whole, MismatchError for one of another store.
    """
    folder = Path(folder)
    listed: list[Any] = [None] * spec.num_shards
    rows = samples = 0
    for number in range(spec.num_shards) if present is None else present:
        manifest = read_shard(folder, spec, frequency_ranks, number)
        if manifest is None:
            raise UsageError(f"{shard_path(folder, number)}: this shard is missing or not whole: capture it first")
        listed[number] = [manifest.fingerprint, *(record.size_bytes for record in manifest.files)]
        rows += int(manifest.parameters["rows"])
        samples += int(manifest.parameters["samples_with_targets"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    with HashingWriter(folder / ORDER) as writer:
        writer.write(_shortened(invert(frequency_ranks)).astype("<i4").data)
        files = [writer.commit()]
    return write_manifest(
        folder / MANIFEST,
        format=FORMAT,
        version=VERSION,
        parameters={
            **spec.parameters(frequency_ranks),
            "rows": rows,
            "samples_with_targets": samples,
            "shards": listed,
        },
        parents=spec.parents,
        tokenizer=spec.tokenizer,
        files=[*files, *more_files],
    )


def _shortened(ids_of_ranks: NDArray[np.int32]) -> NDArray[np.int32]:
    """Cut off the end in which ids only rise: ids that never occurred, most of the vocabulary for a small dataset."""
    falls = np.flatnonzero(np.diff(ids_of_ranks) < 0)
    return ids_of_ranks[: int(falls[-1]) + 1 if len(falls) else 0]

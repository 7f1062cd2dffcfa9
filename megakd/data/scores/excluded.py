"""Ids of samples that are never kept, from selections and files: sorted on disk, so that memory does not grow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import explain_no_space
from megakd.data.scores.artefact import Scores
from megakd.data.selection import MANIFEST as SELECTION
from megakd.data.selection import Selection
from megakd.errors import MismatchError, UsageError

_AT_ONCE = 1 << 20


def read_excluded(
    exclude_ids: Sequence[str], datasets: set[str], scores: Scores
) -> tuple[NDArray[np.int64], dict[str, str]]:
    """The sorted ids to leave out of the dataset of ``scores``, and the fingerprints of the selections that name them.

    exclude_ids: folders of selections, and files of sample ids. datasets: fingerprints of all datasets that are
    selected from; a selection from another one of them names no id of this one.

    Raises UsageError for a file without ids and for an id that no sample has, MismatchError for a selection from
    another dataset.
    """
    parts: list[NDArray[np.int64]] = []
    parents: dict[str, str] = {}
    for entry in exclude_ids:
        path = Path(entry)
        if (path / SELECTION).is_file():
            selection = Selection(path)
            if selection.dataset not in datasets:
                raise MismatchError(
                    f"--exclude-ids {path}: a selection from dataset {selection.dataset}, the scores are of "
                    f"{', '.join(sorted(datasets))}"
                )
            if selection.dataset != scores.manifest.parents["dataset"]:
                continue  # its ids are of another one of the datasets
            for key, selected in (("packing", selection.packing), ("seq_length", selection.seq_length)):
                if selected != scores.manifest.parameters[key]:
                    raise MismatchError(
                        f"--exclude-ids {path}: selected with {key} {selected}, the scores have "
                        f"{scores.manifest.parameters[key]}: its ids name other samples"
                    )
            parents[f"excluded {len(parents)}"] = selection.fingerprint
            parts.append(selection.ids)
        elif len(datasets) > 1:
            raise UsageError(f"--exclude-ids {path}: ids of which dataset? With several, exclude by selections")
        else:
            parts.append(_read_ids(path, scores.num_samples))
    return parts[0] if len(parts) == 1 else sort_unique(parts), parents


def sort_unique(pieces: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All values of the pieces, ascending and without duplicates, as a view of a temporary file."""
    with tempfile.TemporaryFile() as stream:
        count = 0
        with explain_no_space(Path(tempfile.gettempdir()) / "sorted ids"):
            for piece in pieces:
                for first in range(0, len(piece), _AT_ONCE):
                    stream.write(np.ascontiguousarray(piece[first : first + _AT_ONCE], "<i8").data)
                count += len(piece)
            stream.flush()
        if not count:
            return np.zeros(0, np.int64)
        ids: NDArray[np.int64] = np.memmap(stream, "<i8", "r+", shape=(count,))
    ids.sort()  # in place
    kept = 0
    for first in range(0, count, _AT_ONCE):
        piece = np.array(ids[first : first + _AT_ONCE])
        before = np.roll(piece, 1)
        before[0] = ids[kept - 1] if kept else ~piece[0]
        piece = piece[piece != before]
        ids[kept : kept + len(piece)] = piece
        kept += len(piece)
    return ids[:kept]


def _read_ids(path: Path, num_samples: int) -> NDArray[np.int64]:
    if not path.is_file():
        raise UsageError(f"--exclude-ids {path}: no such file, and no selection")
    try:
        ids = sort_unique(_npy_ids(path) if path.suffix == ".npy" else _text_ids(path))
    except (ValueError, OverflowError, EOFError) as error:
        raise UsageError(f"--exclude-ids {path}: {error}: expected one sample id in a line, or .npy") from error
    for place in (0, -1):
        if len(ids) and not 0 <= ids[place] < num_samples:
            raise UsageError(f"--exclude-ids {path}: sample id {ids[place]} of {num_samples} samples")
    return ids


def _npy_ids(path: Path) -> list[NDArray[Any]]:
    ids = np.load(path, mmap_mode="r")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"shape {ids.shape}, dtype {ids.dtype}: expected one axis of integers")
    return [ids]


def _text_ids(path: Path) -> Iterator[NDArray[np.int64]]:
    with open(path, "rb") as stream:
        while block := stream.read(_AT_ONCE):
            yield np.array((block + stream.readline()).split(), dtype=np.int64)

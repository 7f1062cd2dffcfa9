"""What stands for a dataset on the command line: its prefix, one of its files, or the folder that it lies in alone."""

from __future__ import annotations

import os
from pathlib import Path

from megakd.data.indexed.idx_format import bin_path, idx_path
from megakd.errors import UsageError

_ENDINGS = (".bin", ".idx", ".manifest.json")
_SHOWN = 8


def find_prefix(path: str | os.PathLike[str]) -> Path:
    """The prefix of the dataset that ``path`` stands for.

    Raises UsageError where there is none, or a folder has several, with what is there instead.
    """
    if idx_path(path).is_file() and bin_path(path).is_file():
        return Path(path)
    if (stem := without_ending(path)) is not None:
        return _whole(stem)
    if idx_path(path).is_file() or bin_path(path).is_file() or not Path(path).is_dir():
        return _whole(path)
    found = prefixes_in(path)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"{path}: no dataset in this folder: no PREFIX.bin with its PREFIX.idx; give a data path")
    listed = ", ".join(str(prefix) for prefix in found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
    raise UsageError(f"{path}: a folder with {len(found)} datasets: give the prefix of one: {listed}")


def without_ending(path: str | os.PathLike[str]) -> Path | None:
    """The prefix of a dataset of which ``path`` is a file; None where it is none, or the prefix of one itself."""
    text = os.fspath(path)
    for ending in _ENDINGS:
        stem = text.removesuffix(ending)
        if stem != text and not stem.endswith("/") and (idx_path(stem).is_file() or bin_path(stem).is_file()):
            return None if idx_path(path).is_file() else Path(stem)
    return None


def prefixes_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The prefixes of the datasets in a folder, sorted."""
    indexes = sorted(each for each in Path(folder).iterdir() if each.suffix == ".idx" and each.stem)
    return [each.with_suffix("") for each in indexes if each.is_file() and each.with_suffix(".bin").is_file()]


def _whole(prefix: str | os.PathLike[str]) -> Path:
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            near = [str(each) for each in _near(Path(prefix))]
            there = f"; there are {', '.join(near[:_SHOWN])}{', ...' if len(near) > _SHOWN else ''}" if near else ""
            raise UsageError(f"{path}: no such file; data paths are prefixes, without .bin or .idx{there}")
    return Path(prefix)


def _near(prefix: Path) -> list[Path]:
    """Datasets whose prefixes begin as this one does, as that of ``preprocess --output-prefix`` with its key."""
    if not prefix.name or not prefix.parent.is_dir():
        return []
    return [each for each in prefixes_in(prefix.parent) if each.name.startswith(prefix.name) and each != prefix]

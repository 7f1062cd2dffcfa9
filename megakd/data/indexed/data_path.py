"""Data path: a dataset's prefix, one of its files, or a folder in which it is the only dataset."""

from __future__ import annotations

import os
from pathlib import Path

from megakd.data.indexed.idx_format import bin_path, idx_path
from megakd.errors import UsageError

_ENDINGS = (".bin", ".idx", ".bytes", ".manifest.json")
_SHOWN = 8


def find_prefix(path: str | os.PathLike[str]) -> Path:
    """Find the prefix of the dataset that ``path`` stands for.

    Raises UsageError where there is no dataset, or a folder has several; it names what is there instead.
    """
    if idx_path(path).is_file() and bin_path(path).is_file():
        return Path(path)
    if (stem := without_ending(path)) is not None:
        return _whole(stem)
    if idx_path(path).is_file() or bin_path(path).is_file() or not Path(path).is_dir():
        return _whole(path)
    prefixes = prefixes_in(path)
    if len(prefixes) == 1:
        return prefixes[0]
    if not prefixes:
        raise UsageError(f"{path}: no dataset in this folder: no PREFIX.bin with its PREFIX.idx; give a data path")
    listed = ", ".join(str(prefix) for prefix in prefixes[:_SHOWN]) + (", ..." if len(prefixes) > _SHOWN else "")
    raise UsageError(f"{path}: a folder with {len(prefixes)} datasets: give the prefix of one: {listed}")


def without_ending(path: str | os.PathLike[str]) -> Path | None:
    """Prefix of the dataset of which ``path`` is a file; None where it is no such file, or is itself a prefix."""
    text = os.fspath(path)
    for ending in _ENDINGS:
        stem = text.removesuffix(ending)
        if stem != text and not stem.endswith("/") and (idx_path(stem).is_file() or bin_path(stem).is_file()):
            return None if idx_path(path).is_file() else Path(stem)
    return None


def prefixes_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Prefixes of the datasets in a folder, sorted."""
    indexes = sorted(path for path in Path(folder).iterdir() if path.suffix == ".idx" and path.stem)
    return [path.with_suffix("") for path in indexes if path.is_file() and path.with_suffix(".bin").is_file()]


def _whole(prefix: str | os.PathLike[str]) -> Path:
    """The prefix, if both of its files are there; else raises UsageError, naming datasets of similar names."""
    for path in (bin_path(prefix), idx_path(prefix)):
        if not path.is_file():
            near = [str(similar) for similar in _near(Path(prefix))]
            hint = f"; there are {', '.join(near[:_SHOWN])}{', ...' if len(near) > _SHOWN else ''}" if near else ""
            raise UsageError(f"{path}: no such file; data paths are prefixes, without .bin or .idx{hint}")
    return Path(prefix)


def _near(prefix: Path) -> list[Path]:
    """Prefixes that begin with this one, such as those that ``preprocess`` makes of its ``--output-prefix``."""
    if not prefix.name or not prefix.parent.is_dir():
        return []
    return [near for near in prefixes_in(prefix.parent) if near.name.startswith(prefix.name) and near != prefix]

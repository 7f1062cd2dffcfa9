"""Unfinished work on disk: the folder that it waits in, and the shards that were committed there with their counts."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megakd.artefacts.durable_files import fsync_directory
from megakd.artefacts.manifest import Manifest, read_manifest, verify_files
from megakd.errors import CorruptError, UsageError
from megakd.work.console import tell

LISTED = 10_000
"""Bad records, or documents, that are listed, of a shard and of a whole run: the first ones. More are counted."""
WORTH_STOPPING_BYTES = 16 << 20
"""A run that cannot keep its budget stops where more is left; less is read in a moment, and then the list is whole."""


@dataclass
class Tally:
    """Counts that add up over shards; its subclasses name them."""

    def add(self, other: Self) -> None:
        """Add another's counts to these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def open_folder(root: Path, fingerprint: str) -> Path:
    """The folder of unfinished work with this fingerprint; says on stderr whether it is continued.

    Raises UsageError where ``root`` can be no folder.
    """
    folder = root / fingerprint
    if folder.is_dir():
        tell(f"continuing the unfinished run in {folder}")
    elif root.is_dir() and any(root.iterdir()):
        tell(f"starting afresh: what is in {root} is of other inputs or flags; it may be deleted")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--work-dir {root}: a file is in its place; expected a folder, new or there") from error
    fsync_directory(root)
    fsync_directory(root.parent)
    return folder


def remove_folder(root: Path, folder: Path) -> None:
    """Remove finished work, or what a killed run has left of it, and ``root`` too where there is no other's."""
    if folder.is_dir():
        shutil.rmtree(folder)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()


def read_committed(prefix: Path, *, format: str, version: int, verify: bool) -> Manifest | None:
    """The manifest of a shard that was committed at ``prefix``.

    None for one that was not, or, with ``verify``, whose files are not what was committed.
    """
    path = prefix.with_suffix(".json")
    try:
        manifest = read_manifest(path, format=format, version=version)
        return None if verify and verify_files(path) else manifest
    except (UsageError, CorruptError):
        return None


def bad_records(manifest: Manifest) -> Path | None:
    """The list of a shard's bad records, JSON lines; None where there is none."""
    name = manifest.path.with_suffix(".bad.jsonl").name
    return manifest.path.with_name(name) if any(record.name == name for record in manifest.files) else None

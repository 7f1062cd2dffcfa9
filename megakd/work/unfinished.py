"""Folder of unfinished work: one for each set of inputs and flags, continued by the same command, then removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megakd import __version__
from megakd.artefacts.durable_files import fsync_directory
from megakd.artefacts.manifest import as_json
from megakd.errors import UsageError
from megakd.work.console import tell


def work_fingerprint(content: Mapping[str, Any]) -> str:
    """Name of the folder for unfinished work: XXH3-128, in hexadecimal, of this megakd's version and of ``content``,
    plain data that says everything that decides the bytes of the work."""
    known = as_json({"megakd": __version__, **content})
    return xxhash.xxh3_128_hexdigest(orjson.dumps(known, option=orjson.OPT_SORT_KEYS))


def open_folder(root: Path, fingerprint: str) -> Path:
    """Make or find the folder in ``root`` of the work with this fingerprint; says on stderr whether it is continued.

    Raises UsageError where ``root`` can be no folder.
    """
    folder = root / fingerprint
    if folder.is_dir():
        tell(f"continuing the unfinished run in {folder}")
    elif root.is_dir() and any(root.iterdir()):
        tell(f"starting afresh: what is in {root} was made of other inputs or with other flags; it may be deleted")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--work-dir {root}: a file is in its place; expected a folder, new or existing") from error
    fsync_directory(root)
    fsync_directory(root.parent)
    return folder


def remove_folder(root: Path, folder: Path) -> None:
    """Remove the folder of finished work, or what a killed run has left of it, and ``root`` too if nothing else is in
    it."""
    if folder.is_dir():
        shutil.rmtree(folder)
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()

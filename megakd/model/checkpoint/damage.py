"""Whether a checkpoint is what was written, and what a run can do that finds one that is not. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from megakd.artefacts.manifest import Manifest, faults_in_blocks, read_manifest, unlisted_files
from megakd.errors import CorruptError, MismatchError, UsageError

FORMAT, VERSION = "megakd-checkpoint", 1
MANIFEST = "manifest.json"
_SHARDS = "__"  # what names of the large files, those with the tensors, begin with


def checkpoint_folders(folder: Path) -> list[Path]:
    """``iter_...`` folders in ``folder``, the oldest first, whole or not."""
    return sorted(
        path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name) and path.is_dir()
    )  # fmt: skip


def faults_beside_tensors(manifest: Manifest) -> list[str]:
    """Faults of a checkpoint's small files, and files that it did not have; a process alone can afford it."""
    strangers = unlisted_files(manifest)
    small = [record.name for record in manifest.files if not record.name.startswith(_SHARDS)]
    return faults_in_blocks(manifest, small) + [f"{name}: {MANIFEST} does not name it" for name in strangers]


def damaged(path: Path, faults: list[str], *, role: str, flag: str, hash_all: bool) -> CorruptError:
    """The error that says what is wrong with the checkpoint at ``path`` and which one before it to start from.

    flag: what chooses an iteration in the command at hand, "" where nothing does. hash_all: the older checkpoint is
    named only after all of it was hashed; else after its small files were, and a run from it hashes the rest.
    """
    more = f" ({len(faults)} faults)" if len(faults) > 1 else ""
    return CorruptError(f"{role}: {path} is damaged: {faults[0]}{more}; {_way_out(path, flag, hash_all=hash_all)}")


def _way_out(path: Path, flag: str, *, hash_all: bool) -> str:
    older = _newest_whole(path, hash_all=hash_all)
    if older is None:
        return f"no whole checkpoint before it is in {path.parent}; restore it from a copy"
    how = f"{flag} {int(older.name.removeprefix('iter_'))}" if flag else "a copy of it in a folder of its own"
    return f"{older} before it is whole: {how} starts from there; the damaged one is left as it is"


def _newest_whole(path: Path, *, hash_all: bool) -> Path | None:
    if not re.fullmatch(r"iter_\d+", path.name):
        return None
    for older in reversed(checkpoint_folders(path.parent)):
        if older.name >= path.name or not (older / MANIFEST).exists():
            continue
        try:
            manifest = read_manifest(older / MANIFEST)
        except (CorruptError, MismatchError, UsageError):
            continue
        if not faults_beside_tensors(manifest) and not (hash_all and faults_in_blocks(manifest)):
            return older
    return None

"""Damage of checkpoints: its detection, and the error that names an older whole checkpoint. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from megakd.artefacts.manifest import Manifest, faults_in_blocks, read_manifest, unlisted_files
from megakd.errors import CorruptError, MismatchError, UsageError

FORMAT, VERSION = "megakd-checkpoint", 1
MANIFEST = "manifest.json"
_SHARDS, _SAFETENSORS = "__", ".safetensors"  # beginning or end of the names of the large files, which hold tensors


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return the ``iter_...`` folders in ``folder``, oldest first, whole or not."""
    return sorted(
        path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name) and path.is_dir()
    )  # fmt: skip


def faults_beside_tensors(manifest: Manifest) -> list[str]:
    """Return faults of a checkpoint's small files, and files that its manifest does not name; fast on one process."""
    names = [record.name for record in manifest.files]
    small = [name for name in names if not name.startswith(_SHARDS) and not name.endswith(_SAFETENSORS)]
    # a Hugging Face folder has more files than those that determine the model
    strangers = [] if manifest.parameters.get("form") == "huggingface" else unlisted_files(manifest)
    return faults_in_blocks(manifest, small) + [f"{name}: {MANIFEST} does not name it" for name in strangers]


def damaged(path: Path, faults: list[str], *, role: str, flag: str, hash_all: bool) -> CorruptError:
    """Return the error that names the faults of the checkpoint at ``path`` and an older one to start from.

    flag: the flag of this command that chooses an iteration, "" if none does. hash_all: hash all of the older
    checkpoint before it is named; otherwise only its small files, and a run from it hashes the rest.
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

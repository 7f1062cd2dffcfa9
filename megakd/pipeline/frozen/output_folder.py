"""Folders of results: each holds one artefact, so that none is written over another."""

from __future__ import annotations

from pathlib import Path

from megakd.data.scores.artefact import MANIFEST as SCORES
from megakd.data.selection import MANIFEST as SELECTION
from megakd.errors import UsageError
from megakd.logits.journal import manifest_paths
from megakd.logits.spec import MANIFEST as STORE
from megakd.model.checkpoint.record import TRACKER
from megakd.model.proxy.artefact import MANIFEST as PROXY

_KINDS = {
    SCORES: "scores",
    SELECTION: "a selection",
    STORE: "a logits store",
    PROXY: "a proxy",
    TRACKER: "checkpoints",
}


def check_output(folder: Path, flag: str, own: str) -> None:
    """Raise UsageError if ``folder`` is a file, or holds an artefact of another kind.

    flag: names the folder in the message. own: file name of the manifest that may lie there.
    """
    if file := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UsageError(f"{flag} {folder}: a file is there ({file}); expected a folder, new or there")
    for name, kind in _KINDS.items():
        if name != own and (folder / name).exists():
            raise UsageError(f"{flag} {folder}: {kind} lie there ({name}); give a folder of its own")
    if any(map(manifest_paths, (folder, *folder.glob("*/")))):
        raise UsageError(f"{flag} {folder}: a journal of logits lies there; give a folder of its own")

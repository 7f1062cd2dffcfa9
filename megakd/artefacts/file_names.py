"""File names as text: any bytes may be a name, but printed text and JSON must be UTF-8."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Names of manifests that lie beside their files: PREFIX.manifest.json, PREFIX.sentence-1024.json of a packing.
_BESIDE = re.compile(r"(.+?)(?:\.manifest|(\.sentence-[0-9]+))\.json", re.DOTALL)


def printable(text: str | os.PathLike[str]) -> str:
    r"""Make a path, or other text from the command line, valid UTF-8: bytes that are none become ``\udcff``."""
    return os.fspath(text).encode(errors="backslashreplace").decode()


def as_json(value: Any) -> Any:
    """Copy plain data so that every text in it is `printable`; tuples become lists."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {as_json(key): as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def present_names(manifest: Path, recorded: Sequence[str]) -> list[str]:
    """Present names of the files ``recorded`` in ``manifest``.

    Files that share one prefix with their manifest follow its present name, so that a dataset or packing that was
    renamed together with its manifest is still found.
    """
    beside = _BESIDE.fullmatch(manifest.name)
    stems = {Path(name).stem for name in recorded}
    if beside is None or len(stems) != 1 or any("/" in name for name in recorded):
        return list(recorded)
    return [beside[1] + (beside[2] or "") + Path(name).suffix for name in recorded]

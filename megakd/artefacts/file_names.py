"""Names of files as text: any bytes may be a name, and what is printed or stored as JSON must be UTF-8."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# A manifest beside its files: PREFIX.manifest.json of a dataset, PREFIX.sentence-1024.json of a packing.
_BESIDE = re.compile(r"(.+?)(?:\.manifest|(\.sentence-[0-9]+))\.json", re.DOTALL)


def printable(text: str | os.PathLike[str]) -> str:
    r"""A path, or other text from the command line, as UTF-8: bytes of it that are none stand as ``\udcff``."""
    return os.fspath(text).encode(errors="backslashreplace").decode()


def as_json(value: Any) -> Any:
    """Plain data of which every text is `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {as_json(key): as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list | tuple) else value


def present_names(manifest: Path, recorded: Sequence[str]) -> list[str]:
    """What the files ``recorded`` in a manifest are called now: those that lie beside it under one prefix are called as
    it is. So a dataset or packing that was renamed with its manifest is still the same one."""
    beside = _BESIDE.fullmatch(manifest.name)
    stems = {Path(name).stem for name in recorded}
    if beside is None or len(stems) != 1 or any("/" in name for name in recorded):
        return list(recorded)
    return [beside[1] + (beside[2] or "") + Path(name).suffix for name in recorded]

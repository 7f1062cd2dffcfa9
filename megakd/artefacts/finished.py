"""Results that are there already: the same one is kept, another one is not replaced."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.errors import CorruptError, MismatchError


def find_finished(
    path: Path,
    *,
    format: str,
    version: int,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
    flag: str,
) -> Manifest | None:
    """The manifest at ``path`` if it is of what would be made now; None where nothing is there, or its files are not
    whole: that is made again.

    parameters: those that decide it, and no outcomes. parents: all of them. flag: which names the output.

    Raises MismatchError for a result of another format, or made of other inputs or with other parameters: with both
    values; CorruptError for a damaged manifest.
    """
    if not path.exists():
        return None
    manifest = read_manifest(path, format=format, version=version, check_files=False)
    there, here = _identity(manifest.parents, manifest.tokenizer), _identity(parents, tokenizer)
    wrong = _differences(there, here) + _differences(_flat(manifest.parameters), _flat(parameters), all=False)
    if wrong:
        raise MismatchError(
            f"{path} is finished, and another than this: {'; '.join(wrong)}. Give another {flag}, or remove it to make "
            "it anew"
        )
    try:
        return read_manifest(path, format=format, version=version)
    except CorruptError as error:
        print(f"{error}; it is made again", file=sys.stderr)
        return None


def say_complete(path: str | Path) -> None:
    """Tell that there is nothing to do."""
    print(f"{path}: complete already, made of the same inputs with the same parameters", file=sys.stderr)


def _identity(parents: Mapping[str, str], tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    known = tokenizer or {}
    return {**parents, "tokenizer": known.get("hash"), "end-of-document id": known.get("eod")}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], *, all: bool = True) -> list[str]:
    """Both values of what differs. all: also of what is not given here."""
    return [
        f"{key}: {there.get(key, 'none')} there, {here.get(key, 'none')} here"
        for key in dict.fromkeys([*(there if all else ()), *here])
        if there.get(key) != here.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values under dotted keys, so that of a group only what differs is told."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat

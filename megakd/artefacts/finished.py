"""Results that exist already: the same result is kept, a different one is not replaced."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.artefacts.manifest import Manifest, read_manifest
from megakd.errors import CorruptError, MismatchError


def find_finished(
    path: Path,
    *,
    format: str,
    version: int | Sequence[int],
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None,
    flag: str,
) -> Manifest | None:
    """Read the manifest at ``path`` if its result is the one that would be made now.

    None where no manifest is there, or where its files are not whole, so that the result is to be made again.
    version: one that the caller can read, or several. parameters: those that decide the result, without figures that
    come out of it. parents: all parents. flag: the flag that names the output, for messages.

    Raises MismatchError for a result of another format, of other parents or with other parameters, naming both values;
    CorruptError for a damaged manifest.
    """
    if not path.exists():
        return None
    manifest = read_manifest(path, format=format, version=version, check_files=False)
    recorded, wanted = _identity(manifest.parents, manifest.tokenizer), _identity(parents, tokenizer)
    wrong = _differences(recorded, wanted) + _differences(_flat(manifest.parameters), _flat(parameters), all=False)
    if wrong:
        raise MismatchError(
            f"{path} is finished, and was made otherwise than now: {'; '.join(wrong)}. Give another {flag}, or remove "
            "it to make it anew"
        )
    try:
        return read_manifest(path, format=format, version=version)
    except CorruptError as error:
        print(f"{error}; it is made again", file=sys.stderr)
        return None


def say_complete(path: str | Path) -> None:
    """Print that the result at ``path`` is there already."""
    print(f"{path}: complete already, made of the same inputs with the same parameters", file=sys.stderr)


def _identity(parents: Mapping[str, str], tokenizer: Mapping[str, Any] | None) -> dict[str, Any]:
    known = tokenizer or {}
    return {**parents, "tokenizer": known.get("hash"), "end-of-document id": known.get("eod")}


def _differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, all: bool = True) -> list[str]:
    """Both values of each key that differs. all: False for the keys of ``wanted`` alone."""
    return [
        f"{key}: {recorded.get(key, 'none')} there, {wanted.get(key, 'none')} here"
        for key in dict.fromkeys([*(recorded if all else ()), *wanted])
        if recorded.get(key) != wanted.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values under dotted keys, so that only the differing values of a group are named."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat

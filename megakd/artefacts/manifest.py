"""The manifest: the record that makes files on disk an artefact, with their hashes and its fingerprint.

A manifest is canonical JSON (sorted keys, two-space indent, one newline at the end) beside the raw files it names.
It is written after every file it names is durable, so a file that has its manifest is whole. See docs/formats.md.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import xxhash

from megakd import __version__
from megakd.artefacts.durable_files import (
    BLOCK_BYTES,
    FileRecord,
    HashingWriter,
    OnBytes,
    atomic_write,
    commit_file,
    hash_block,
    hash_file,
)
from megakd.errors import CorruptError, MismatchError, UsageError

__all__ = [
    "FileRecord",
    "HashingWriter",
    "Manifest",
    "atomic_write",
    "commit_file",
    "fault_in_block",
    "faults_in_blocks",
    "hash_file",
    "read_manifest",
    "unlisted_files",
    "verify_files",
    "write_manifest",
]

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


_KEYS = {"checksum", "files", "format", "megakd_version", "parameters", "parents", "tokenizer", "version"}


@dataclass(frozen=True)
class Manifest:
    """Record of an artefact: format, parameters, parents and files."""

    path: Path
    format: str
    version: int
    megakd_version: str
    parameters: Mapping[str, Any]
    parents: Mapping[str, str]
    """Name of each artefact that this one was made from -> its fingerprint."""
    tokenizer: Mapping[str, Any] | None
    """``type``, ``hash``, ``vocab_size``, ``eod``; ``path`` is a hint and no part of the fingerprint."""
    files: tuple[FileRecord, ...]
    fingerprint: str = field(init=False)
    """XXH3-128 of the content without file names, tool version and hints, so that a copy elsewhere has the same."""

    def __post_init__(self) -> None:
        tokenizer = None if self.tokenizer is None else {k: v for k, v in self.tokenizer.items() if k != "path"}
        content = {
            "format": self.format,
            "version": self.version,
            "parameters": self.parameters,
            "parents": self.parents,
            "tokenizer": tokenizer,
            "files": [[f.size_bytes, f.xxh3_128] for f in self.files],
        }
        object.__setattr__(self, "fingerprint", _hash_json(content))

    def differences(
        self, parameters: Mapping[str, Any], parents: Mapping[str, str], tokenizer: Mapping[str, Any] | None
    ) -> list[str]:
        """Differences between this artefact and one that would be made with the arguments, with both values of each.

        Parameters and parents that are not among the arguments may have any value. Tokenizers are compared by hash.
        """
        recorded = {**self.parents, "tokenizer": _tokenizer_hash(self.tokenizer), **self.parameters}
        wanted = {**parents, "tokenizer": _tokenizer_hash(tokenizer), **parameters}
        return [
            f"{key}: {recorded.get(key)} there, {value} here"
            for key, value in wanted.items()
            if recorded.get(key) != value
        ]


def write_manifest(
    path: str | os.PathLike[str],
    *,
    format: str,
    version: int,
    parameters: Mapping[str, Any],
    parents: Mapping[str, str],
    tokenizer: Mapping[str, Any] | None = None,
    files: Sequence[FileRecord],
) -> Manifest:
    """Write the manifest of files that are already durable under their final names beside it.

    Raises ValueError for parameters that JSON cannot hold exactly (NaN, infinities).
    """
    manifest = Manifest(
        path=Path(path),
        format=format,
        version=version,
        megakd_version=__version__,
        parameters=_plain(parameters),
        parents=as_json(parents),
        tokenizer=None if tokenizer is None else _with_path(_plain(tokenizer), os.path.abspath),
        files=tuple(files),
    )
    body = _body(manifest)
    atomic_write(path, _encode({**body, "checksum": _hash_json(body)}))
    return manifest


def read_manifest(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    version: int | Sequence[int] | None = None,
    check_files: bool = True,
) -> Manifest:
    """Read a manifest and check that every file it names is there with the recorded size (not the hashes).

    format, version (one, or several): those that the caller can read; None for any. check_files: False to read the
    manifest alone.

    Raises UsageError where there is no manifest, CorruptError for a damaged manifest or a missing, cut or foreign file,
    MismatchError for another format or an unknown version.
    """
    path = Path(path)
    manifest = _parse(path)
    if format is not None and manifest.format != format:
        raise MismatchError(f"{path}: this is a {manifest.format!r}, expected a {format!r}")
    known = [version] if isinstance(version, int) else version
    if known is not None and manifest.version not in known:
        raise MismatchError(
            f"{path}: {manifest.format} format version {manifest.version}, this megakd ({__version__}) reads version "
            f"{', '.join(map(str, known))}; it was written by megakd {manifest.megakd_version}"
        )
    for record in manifest.files if check_files else ():
        size_bytes = os.path.getsize(_locate(path, record.name))
        if size_bytes != record.size_bytes:
            raise CorruptError(
                f"{path.parent / record.name}: {size_bytes} bytes on disk, {record.size_bytes} in {path.name}; "
                "the file was cut, replaced or half copied: restore it or make it again"
            )
    return manifest


def verify_files(path: str | os.PathLike[str], *, progress: OnBytes | None = None) -> list[str]:
    """Hash every file of the manifest at ``path``; return a line for each fault, naming file and block."""
    path = Path(path)
    faults = []
    for record in _parse(path).files:
        try:
            found = hash_file(_locate(path, record.name), progress=progress)
        except CorruptError as error:
            faults.append(str(error))
            continue
        if found.size_bytes != record.size_bytes:
            faults.append(f"{record.name}: {found.size_bytes} bytes on disk, {record.size_bytes} in the manifest")
        for block, (have, want) in enumerate(zip(found.blocks, record.blocks)):
            if have != want:
                faults.append(_block_fault(record, block, have))
    return faults


def faults_in_blocks(
    manifest: Manifest, names: Collection[str] | None = None, *, share: int = 0, num_shares: int = 1
) -> list[str]:
    """Hash the blocks of all files of ``manifest``, or only of those in ``names``; return a line for each fault.

    Processes that each take one ``share`` of ``num_shares`` hash every byte once between them.
    """
    root = manifest.path.parent
    records = [record for record in manifest.files if names is None or record.name in names]
    blocks = [(record, block) for record in records for block in range(len(record.blocks))]
    return [
        fault
        for record, block in blocks[share::num_shares]
        if (fault := fault_in_block(root / record.name, record, block)) is not None
    ]


def fault_in_block(path: str | os.PathLike[str], record: FileRecord, block: int) -> str | None:
    """Hash one block of the file at ``path``; return a line if it differs from ``record``, None if it does not."""
    try:
        have = hash_block(path, block)
    except OSError as error:  # a bad sector, say
        return f"{record.name}: block {block} cannot be read: {error.strerror}"
    return None if have == record.blocks[block] else _block_fault(record, block, have)


def unlisted_files(manifest: Manifest) -> list[str]:
    """Files in the manifest's folder that it does not name, for artefacts that have a folder of their own.

    Files ``.nfs*``, which NFS keeps of files that were removed while open, are not counted.
    """
    root, known = manifest.path.parent, {record.name for record in manifest.files} | {manifest.path.name}
    files = (path for path in root.rglob("*") if not path.is_dir() and not path.name.startswith(".nfs"))
    return sorted({str(path.relative_to(root)) for path in files} - known)


def _block_fault(record: FileRecord, block: int, have: str) -> str:
    start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, record.size_bytes)
    return f"{record.name}: block {block} (bytes {start} to {stop}) has XXH3-128 {have}, not {record.blocks[block]}"


def _locate(manifest_path: Path, name: str) -> str:
    """The file ``name`` of a manifest; CorruptError if it is missing or lies, by any trick, outside the folder."""
    if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise CorruptError(f"{manifest_path}: file name {name!r}: expected one relative to the manifest's folder")
    path = os.path.join(manifest_path.parent, name)
    if not os.path.isfile(path):
        raise CorruptError(f"{path}: missing; {manifest_path.name} names it")
    root, real = os.path.realpath(manifest_path.parent), os.path.realpath(path)
    if os.path.commonpath((root, real)) != root:
        raise CorruptError(f"{path}: a link to {real}, outside {root}; copy the file there instead")
    return path


def _parse(path: Path) -> Manifest:
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path}: no manifest here; the artefact is unfinished, or the path is wrong") from error
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"{path}: not a manifest: {error}") from error
    if not isinstance(body, dict) or set(body) != _KEYS:
        found = sorted(body) if isinstance(body, dict) else type(body).__name__
        if not isinstance(body, dict) or len(_KEYS & set(body)) < len(_KEYS) / 2:
            shown = ", ".join(found[:8]) if isinstance(found, list) else f"a {found}"
            raise UsageError(f"{path}: JSON, but not a manifest of megakd's: it holds {shown}")
        raise CorruptError(f"{path}: not a manifest: keys {found}, expected {sorted(_KEYS)}")
    checksum = body.pop("checksum")
    if checksum != _hash_json(body):
        raise CorruptError(f"{path}: checksum {checksum}, content {_hash_json(body)}; the manifest was changed")
    try:
        manifest = Manifest(
            path=path,
            **{key: body[key] for key in _KEYS - {"checksum", "files", "tokenizer"}},
            tokenizer=None if body["tokenizer"] is None else _with_path(body["tokenizer"], partial(_found, path)),
            files=_file_records(path, body["files"]),
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path}: not a manifest: {error}") from error
    # With the bytes equal to what we would write, no flipped byte can hide in the white space.
    if raw != _encode({**body, "checksum": checksum}):
        raise CorruptError(f"{path}: not in canonical form; the manifest was changed")
    return manifest


def _file_records(path: Path, records: Sequence[Mapping[str, Any]]) -> tuple[FileRecord, ...]:
    names = present_names(path, [str(record["name"]) for record in records])
    return tuple(_file_record(path, record, name) for record, name in zip(records, names))


def _file_record(path: Path, record: Mapping[str, Any], name: str) -> FileRecord:
    if not isinstance(record["name"], str) or not isinstance(record["size_bytes"], int):
        raise CorruptError(f"{path}: file {record['name']!r} of {record['size_bytes']!r} bytes is no file record")
    if len(record["blocks"]) != -(-record["size_bytes"] // BLOCK_BYTES):
        raise CorruptError(
            f"{path}: {record['name']} of {record['size_bytes']} bytes has {len(record['blocks'])} blocks"
        )
    return FileRecord(**{**record, "name": name, "blocks": tuple(record["blocks"])})


def _with_path(tokenizer: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    path = tokenizer.get("path")
    return {**tokenizer, "path": change(path)} if isinstance(path, str) else dict(tokenizer)


def _stored(manifest: Path, path: str) -> str:
    """Path of a tokenizer as it is recorded: relative where it lies inside the manifest's folder, so that both can be
    moved together, else absolute."""
    beside = os.path.relpath(path, os.path.abspath(manifest.parent))
    return printable(path if beside == ".." or beside.startswith("../") else beside)


def _found(manifest: Path, path: str) -> str:
    """Inverse of `_stored`. Older versions recorded paths relative to the folder that they were called in."""
    if os.path.isabs(path):
        return path
    candidates = [os.path.abspath(manifest.parent / path), os.path.abspath(path)]
    return next(filter(os.path.exists, candidates), candidates[0])


def _body(manifest: Manifest) -> dict[str, Any]:
    tokenizer = manifest.tokenizer
    if tokenizer is not None:
        tokenizer = _with_path(tokenizer, partial(_stored, manifest.path))
    return {
        "format": manifest.format,
        "version": manifest.version,
        "megakd_version": manifest.megakd_version,
        "parameters": manifest.parameters,
        "parents": manifest.parents,
        "tokenizer": tokenizer,
        "files": [
            {"name": printable(f.name), "size_bytes": f.size_bytes, "xxh3_128": f.xxh3_128, "blocks": list(f.blocks)}
            for f in manifest.files
        ],
    }


def _tokenizer_hash(tokenizer: Mapping[str, Any] | None) -> Any:
    return None if tokenizer is None else tokenizer.get("hash")


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy in JSON's own types; ValueError for NaN, which orjson would write as null."""
    plain: dict[str, Any] = json.loads(json.dumps(as_json(value), allow_nan=False))
    return plain


def _encode(body: Mapping[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _hash_json(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(orjson.dumps(body, option=orjson.OPT_SORT_KEYS))


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

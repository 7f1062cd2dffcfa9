"""Format of an input file, by its first bytes: JSON lines, or another one, named with the way to make JSON lines."""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megakd.data.text.decompress import GZIP, ZSTD, Kind, after_skippable_frames, is_skippable, open_stream
from megakd.data.text.records import BOM, RecordError, name_type, parse_record
from megakd.errors import CorruptError, UsageError

_HEAD_BYTES = 1 << 16
_SUFFIXES: dict[str, Kind] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_RECOMPRESS = "decompress it, or recompress it with zstd"
_UNPACKED = {"gzip": "gzip -dc", "zstd": "zstd -dc --long=31"}
_UNPACK = "unpack it, and give the files in it"
_EXPORT = "export it as JSON lines, one object with its text a line"
# Offset, bytes, name of the format, advice.
_MAGICS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"BZh", "bzip2", _RECOMPRESS),
    (0, b"\xfd7zXZ\x00", "xz", _RECOMPRESS),
    (0, b"\x5d\x00\x00", "lzma", _RECOMPRESS),
    (0, b"LZIP", "lzip", _RECOMPRESS),
    (0, b"\x89LZO\x00", "lzop", _RECOMPRESS),
    (0, b"\x1f\x9d", "compress (.Z)", _RECOMPRESS),
    (0, b"\x04\x22\x4d\x18", "lz4", _RECOMPRESS),
    (0, b"\x02\x21\x4c\x18", "lz4 (legacy frames)", _RECOMPRESS),
    (0, b"\xff\x06\x00\x00sNaPpY", "snappy", _RECOMPRESS),
    *((0, bytes([0x1E + i]) + b"\xb5\x2f\xfd", "zstandard of before version 0.8", _RECOMPRESS) for i in range(10)),
    (0, b"\x37\xa4\x30\xec", "a zstandard dictionary", "give the files that were compressed with it, decompressed"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PAR1", "Parquet", _EXPORT),
    (0, b"PARE", "encrypted Parquet", _EXPORT),
    (0, b"ARROW1", "an Arrow file (Feather)", _EXPORT),
    (0, b"FEA1", "a Feather file", _EXPORT),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _EXPORT),
    (0, b"ORC", "ORC", _EXPORT),
    (0, b"Obj\x01", "Avro", _EXPORT),
    (0, b"SQLite format 3\x00", "an SQLite database", _EXPORT),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5", _EXPORT),
    (0, b"\x93NUMPY", "a numpy array (.npy)", _EXPORT),
    *((0, bytes([0x80, version]), "a Python pickle (.pkl, .pt)", _EXPORT) for version in range(2, 6)),
    (
        0,
        b"MMIDIDX\x00\x00",
        "the index of a Megatron dataset",
        "it has its tokens already: train on it, or retokenize it",
    ),
    (0, b"WARC/", "a WARC archive", "extract the text of its pages to JSON lines"),
    (0, b"%PDF-", "PDF", "extract its text to JSON lines"),
    (0, b"\x89PNG", "an image (PNG)", "give files of text"),
    (0, b"\xff\xd8\xff", "an image (JPEG)", "give files of text"),
    (0, b"\x7fELF", "a program", "give files of text"),
    (0, b"GGUF", "model weights (GGUF)", "give files of text"),
)
_IN_ZIP = (
    (b"data.pkl", "a file of torch.save (.pt)"),
    (b".npy", "numpy arrays (.npz)"),
    (b"[Content_Types].xml", "an Office file"),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_FIELD = re.compile(r"[^\s\"'{}\[\]](?:[^\"'{}\[\]]{0,38}[^\s\"'{}\[\]])?|\"[^\"]{1,40}\"")


def kind_of(path: Path) -> Kind:
    """Find out how a file is compressed, by its first bytes.

    Raises UsageError, naming the format, for a file whose first 64 KiB are not JSON lines in UTF-8; CorruptError for a
    suffix that its content contradicts, and for a compressed file that is damaged there.
    """
    with open(path, "rb", buffering=0) as file:
        magic = file.read(8)
        kind: Kind = "gzip" if magic.startswith(GZIP) else "zstd" if magic.startswith(ZSTD) else "plain"
        if is_skippable(magic):
            kind = "zstd"
            behind = after_skippable_frames(file)
            if not behind.startswith(ZSTD):
                _refuse_magic(path, behind)
        named = _SUFFIXES.get(path.suffix)
        if named is not None and named != kind:
            file.seek(0)
            _refuse_magic(path, file.read(_HEAD_BYTES))
            raise CorruptError(f"{path}: named {path.suffix}, but starts with {magic!r}; it was cut or is misnamed")
        file.seek(0)
        head = b""
        stream = open_stream(file, path, kind, buffer_bytes=_HEAD_BYTES)
        while len(head) < _HEAD_BYTES and (piece := stream.read(_HEAD_BYTES - len(head))):
            head += piece
    _refuse_magic(path, head)
    if head.startswith((GZIP, ZSTD)) and kind != "plain":
        raise UsageError(f"{path}: compressed twice: decompress it once")
    to_lines = functools.partial(_command, path, kind)
    if what := _not_json_lines(head.removeprefix(BOM), whole=len(head) < _HEAD_BYTES, path=path, to_lines=to_lines):
        raise UsageError(f"{path}: {what}")
    return kind


def _command(path: Path, kind: Kind, program: str) -> str:
    """Shell command that makes JSON lines of a file with ``program``, which filters text."""
    name = shlex.quote(str(path))
    return f"{program} < {name} > NEW.jsonl" if kind == "plain" else f"{_UNPACKED[kind]} {name} | {program} > NEW.jsonl"


def _refuse_magic(path: Path, head: bytes) -> None:
    """Raise UsageError for a format that is known by its first bytes."""
    if _is_safetensors(head):
        raise UsageError(f"{path}: this is model weights (safetensors): give files of text")
    for offset, magic, name, advice in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            if magic == b"PK\x03\x04":
                name, advice = next(((inner, _EXPORT) for mark, inner in _IN_ZIP if mark in head[:256]), (name, advice))
            raise UsageError(f"{path}: this is {name}: {advice}")
    if _is_old_tar(head):
        raise UsageError(f"{path}: this is a tar archive: {_UNPACK}")
    if _is_wide(head):
        raise UsageError(f"{path}: looks like UTF-16 or UTF-32; expected UTF-8: iconv -f UTF-16 -t UTF-8 {path}")


def _is_safetensors(head: bytes) -> bool:
    return head[8:10] == b'{"' and head[5:8] == bytes(3)


def _is_old_tar(head: bytes) -> bool:
    """Return whether a tar header stands there, which has no magic number in old archives: by its check sum."""
    check_sum = head[148:156].strip(b" \0")
    if len(head) < 512 or not re.fullmatch(rb"[0-7]{1,7}", check_sum):
        return False
    return int(check_sum, 8) == sum(head[:148]) + 8 * ord(" ") + sum(head[156:512])


def _is_wide(head: bytes) -> bool:
    """Return whether characters take two or four bytes: there is a byte order mark, or every second byte is zero."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        return True
    start = head[:64]
    even, odd = start[0::2], start[1::2]
    return len(start) >= 4 and min(even.count(0) / len(even), odd.count(0) / len(odd)) < 0.05 and (
        max(even.count(0) / len(even), odd.count(0) / len(odd)) > 0.2
    )  # fmt: skip


def _not_json_lines(head: bytes, *, whole: bool, path: Path, to_lines: Callable[[str], str]) -> str | None:
    """Name the format of a file that begins with ``head``, and the way to make JSON lines of it.

    None where some line is, or may be, a record: the bad lines of such a file are counted later, when it is read.
    whole: True if the file ends with ``head``. to_lines: makes the shell command that filters the file with a program.
    """
    lines = head.splitlines(keepends=True) if b"\n" not in head else [line + b"\n" for line in head.split(b"\n")]
    if b"\n" in head and not whole:
        del lines[-1]  # the line goes on behind the head
    lines = [line for line in lines if line.strip()]
    if not lines:
        return None
    ends_with_cr = b"\n" not in head and len(lines) > 1
    text = head.decode(errors="replace")
    if not ends_with_cr and _value(lines[0]) is _NO_VALUE and _spans_lines(text.lstrip(), whole=whole):
        return _one_array(to_lines) if text.lstrip().startswith("[") else _spread(to_lines)
    values = []
    for line in lines:
        value = _value(line)
        if type(value) is dict and not ends_with_cr:
            return None
        values.append(value)
    first = lines[0].lstrip()
    if ends_with_cr:
        if any(type(value) is dict for value in values):
            return "its lines end in CR alone; expected LF: " + to_lines(r"tr '\r' '\n'")
        lines, values, first = [head], [_value(head)], head.lstrip()
    if first.startswith(b"["):
        if len(lines) > 1 and all(type(value) is list for value in values):
            return "each line is a list, expected an object"
        return _one_array(to_lines)
    if first.startswith(b"{"):
        return _not_lines_of_objects(lines, text, to_lines)
    if first.startswith(b"\x1e"):
        return "this is a JSON text sequence (RFC 7464); expected lines alone: " + to_lines(r"tr -d '\036'")
    kinds = {name_type(value) for value in values if value is not _NO_VALUE}
    if len(kinds) == 1 and _NO_VALUE not in values:
        return f"each line is {kinds.pop()}, expected an object: " + to_lines("jq -c '{text: .}'")
    if _CONTROL.search(head):
        hint = "; the index beside it is a Megatron dataset's" if path.with_suffix(".idx").exists() else ""
        return f"this is no text, but bytes of an unknown format{hint}; expected JSON lines in UTF-8"
    try:
        head[: -4 if not whole and len(head) > 4 else None].decode()
    except UnicodeDecodeError as error:
        return (
            f"this is no JSON, and not UTF-8 (byte 0x{head[error.start]:02x} at {error.start}); expected JSON lines in "
            f"UTF-8: iconv -f LATIN1 -t UTF-8, for one"
        )
    if first.startswith(b"<"):
        return "this is XML or HTML: extract its text to JSON lines"
    if columns := _columns(text):
        return f"this is CSV, or a table like it (columns {', '.join(columns[:5])}): {_EXPORT}"
    return "this is plain text, no JSON; of each line a record: " + to_lines("jq -cR '{text: .}'")


_NO_VALUE: Any = object()


def _value(line: bytes) -> Any:
    try:
        return parse_record(line)
    except RecordError:
        return _NO_VALUE


def _spans_lines(text: str, *, whole: bool) -> bool:
    """Return whether the JSON value that begins in the first line goes on over more lines.

    In a head that ends inside a value: whether the value spans three line ends, or most of the head.
    """
    if text[:1] not in ("[", "{"):
        return False
    try:
        _, end = json.JSONDecoder(parse_int=float).raw_decode(text)
        return "\n" in text[:end]
    except json.JSONDecodeError as error:
        return text.count("\n", 0, error.pos) >= 3 or (
            not whole and "\n" in text[: error.pos] and 2 * error.pos > len(text)
        )
    except RecursionError:
        return False


def _one_array(to_lines: Callable[[str], str]) -> str:
    return "this is one JSON array; expected a record in each line: " + to_lines("jq -c '.[]'")


def _spread(to_lines: Callable[[str], str]) -> str:
    return "its records are spread over lines; expected one in each line: " + to_lines("jq -c .")


def _not_lines_of_objects(lines: list[bytes], text: str, to_lines: Callable[[str], str]) -> str | None:
    """Name the format of a file that begins with a brace but has no line that is a record; see `_not_json_lines`."""
    try:
        _, end = json.JSONDecoder(parse_int=float).raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        end = 0
    if end and text.lstrip()[end:].lstrip(" \t").startswith("{"):
        return "it has several records in a line; expected one: " + to_lines("jq -c .")
    if all(type(_value(line.strip().rstrip(b","))) is dict for line in lines):
        return "its lines end in commas; expected a record alone in each line: " + to_lines(r"sed 's/,\s*$//'")
    if all(map(_is_python, lines)):
        return "its lines are Python's notation (single quotes, None), not JSON: write them with json.dumps"
    return None


def _is_python(line: bytes) -> bool:
    if not re.match(rb"\s*\{\s*'", line):
        return False
    try:
        return isinstance(ast.literal_eval(line.decode().strip()), dict)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _columns(text: str) -> list[str]:
    """Column names of a table with a delimiter: short names in its first line, no fewer fields in the next one."""
    lines = [line for line in text.splitlines()[:8] if line.strip()]
    for delimiter in "\t,;|":
        names = lines[0].split(delimiter)
        if len(names) < 2 or len(lines) < 2 or not all(map(_FIELD.fullmatch, names)):
            continue
        rows = csv.reader(lines[1:2], delimiter=delimiter)
        if all(len(row) >= len(names) for row in rows):
            return [name.strip('"') for name in names]
    return []

"""JSON lines: read line by line in bounded memory, their texts, and the reasons for which a record is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from megakd.data.text.decompress import READ_BYTES, Kind, open_stream

BOM = b"\xef\xbb\xbf"

_SKIP_REPORT_BYTES = 256 << 20
# Usual keys of texts, suggested before the key of a record's longest string.
_USUAL_KEYS = ("text", "content", "raw_content", "body", "document", "markdown", "code", "article")
# Python's own parser, for lines that orjson refuses and Megatron's tool takes. The values of numbers are not used, so
# integers are parsed as floats: Python refuses integers of more than 4,300 digits.
_LENIENT = json.JSONDecoder(parse_int=float)


@dataclass(frozen=True)
class BadRecord:
    """A line that gives no document."""

    line: int
    """1 for the first line of the file, blank ones counted."""
    byte_offset: int
    """Byte of the decompressed file at which the line starts."""
    reason: str
    """One of a few fixed texts, to count by."""
    detail: str


class RecordError(ValueError):
    """A line that gives no document: a short reason, and its detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Lines:
    """Lines of a file that start at or after byte ``start`` of the decompressed file.

    A plain file is read from there, a compressed one from its beginning. max_line_bytes: a longer line is skipped and
    comes as None. on_skip: called now and then on the way to ``start``, which may take long in a compressed file.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        *,
        start: int = 0,
        max_line_bytes: int,
        on_skip: Callable[[], object] = lambda: None,
    ) -> None:
        self.path = path
        self.num_bytes_read = 0
        """Bytes read so far of the file on disk: from ``start`` on in a plain file, else from its beginning."""
        self._kind = kind
        self._start = start
        self._max = max_line_bytes
        self._on_skip = on_skip

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Iterate over pairs of byte offset and line, with its line end."""
        with open(self.path, "rb", buffering=0) as file:
            yield from self._read(file)

    def _read(self, file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
        offset = 0
        if self._kind == "plain" and self._start > 0:
            # The byte before tells whether a line starts exactly here.
            offset = self._start - 1
            file.seek(offset)
        base = offset
        stream = open_stream(file, self.path, self._kind)
        if offset:
            offset += _skip_line(stream)
        first = True
        readline, limit = stream.readline, self._max + 1
        while line := readline(limit):
            start, size = offset, len(line)
            if first and start == 0:
                line = line.removeprefix(BOM)
            first = False
            kept: bytes | None = line
            if size == limit and line[-1:] != b"\n":
                kept = None
                size += _skip_line(stream)
            offset += size
            self.num_bytes_read = offset - base if self._kind == "plain" else file.tell()
            if start >= self._start:
                yield start, kept
            elif start // _SKIP_REPORT_BYTES != offset // _SKIP_REPORT_BYTES:
                self._on_skip()


def parse_record(line: bytes) -> Any:
    """Parse a line of JSON as Megatron's tool does, which takes NaN, Infinity, 1e999, numbers of any length and half a
    surrogate pair. Raises RecordError."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            return _LENIENT.decode(line.decode())
        except (ValueError, RecursionError):
            raise _explain(line, error) from None


def parse_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The text under each key of one JSON record. Raises RecordError."""
    try:
        record, strict = orjson.loads(line), True
    except orjson.JSONDecodeError:
        record, strict = parse_record(line), False
    if type(record) is not dict:
        raise RecordError("not an object", f"the record is {name_type(record)}, expected an object")
    texts = []
    for key in keys:
        text = record.get(key)
        if type(text) is not str:
            raise _no_text(record, key, keys)
        if not strict:
            _check_surrogates(text, key)
        texts.append(text)
    return texts


def count_duplicate_keys(line: bytes, keys: Sequence[str], quoted: Sequence[bytes]) -> int:
    """Number of the keys that a record has more than once; the last one counts. quoted: the keys as JSON."""
    if all(line.count(name) < 2 for name in quoted):
        return 0
    pairs: list[tuple[str, Any]] = []

    def keep_last(members: list[tuple[str, Any]]) -> None:
        pairs[:] = members  # objects end from the inside out: the record itself comes last

    try:
        json.JSONDecoder(object_pairs_hook=keep_last, parse_int=float).decode(line.decode())
    except RecursionError:  # orjson goes deeper than Python; duplicates in such a record are not counted
        return 0
    names = [name for name, _ in pairs]
    return sum(names.count(key) > 1 for key in keys)


def _no_text(record: Mapping[str, Any], key: str, keys: Sequence[str]) -> RecordError:
    """Error for a record without text under a key, with the key that may be meant."""
    string_keys = [
        name
        for name, value in record.items()
        if type(value) is str and name not in keys and name.isprintable() and "/" not in name
    ]
    better = next((name for name in _USUAL_KEYS if name in string_keys), None)
    if better is None and string_keys:
        better = max(string_keys, key=lambda name: len(record[name]))
    hint = ""
    if better is not None:
        hint = f"; --json-keys {shlex.join(better if name == key else name for name in keys)}?"
    if key in record:
        return RecordError("not text", f"{key!r} is {name_type(record[key])}, expected a string{hint}")
    names = [name[:24] for name in sorted(record)[:8]]
    return RecordError("missing key", f"no key {key!r} among {names}{hint}")


def _check_surrogates(text: str, key: str) -> None:
    """Raise RecordError for half a surrogate pair, which no UTF-8 has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError("lone surrogate", f"{key!r} has half a surrogate pair at character {error.start}") from None


def _explain(line: bytes, error: orjson.JSONDecodeError) -> RecordError:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return RecordError("invalid UTF-8", f"{wrong.reason} at byte {wrong.start} of the line")
    if not line.endswith(b"\n"):
        return RecordError("cut last line", f"the file ends inside a record: {error}")
    return RecordError("malformed JSON", str(error))


def name_type(value: object) -> str:
    """Name the type of a JSON value, in words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}[type(value)]


def _skip_line(stream: IO[bytes]) -> int:
    """Read to the end of the line; returns the number of bytes read."""
    count = 0
    while piece := stream.readline(READ_BYTES):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count

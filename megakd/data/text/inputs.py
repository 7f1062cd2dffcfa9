"""Input files: finding them, sampling their texts, and noticing that they change."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megakd.data.text.decompress import Kind
from megakd.data.text.input_formats import kind_of
from megakd.data.text.records import Lines, RecordError, parse_texts
from megakd.errors import MismatchError, UsageError

_SAMPLE_STRETCHES = 16


@dataclass(frozen=True)
class Input:
    """One input file, with its size and time of modification when the run began."""

    path: str
    kind: Kind
    size_bytes: int
    modified_ns: int


def find_inputs(names: Sequence[str], *, own: str) -> list[Input]:
    """Find the input files, in the order of ``names``; those of a glob sorted.

    own: a file that the run itself writes, which no input may be; "" for none.

    Raises UsageError for an input that is missing, no regular file, not JSON lines in UTF-8, named twice, or ``own``.
    """
    paths: list[str] = []
    for name in names:
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UsageError(f"--input {name}: {_why_nothing(name)}")
        paths += matches
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if os.path.isdir(path):
            raise UsageError(f"--input {path}: not a file; give files, or a glob such as '{_glob_of(path)}'")
        if not os.path.isfile(path):
            raise UsageError(
                f"--input {path}: not a file; inputs are read more than once, from many places: write what comes from "
                "a pipe to a file first"
            )
        if real in seen:
            raise UsageError(f"--input {path}: the same file as {seen[real]}; give each file once")
        if real == os.path.realpath(own):
            raise UsageError(f"--input {path}: this run's own list of bad records; keep inputs and outputs apart")
        seen[real] = path
    inputs = []
    for path in paths:
        status = os.stat(path)
        inputs.append(Input(path, kind_of(Path(path)), status.st_size, status.st_mtime_ns))
    return inputs


def sample_texts(inputs: Sequence[Input], keys: Sequence[str]) -> list[str]:
    """Sample texts for the comparison of engines: stretches all over the plain inputs, the heads of compressed ones."""
    total = sum(item.size_bytes for item in inputs)
    stretch = min(max(total // 400, 256 << 10), 4 << 20) // _SAMPLE_STRETCHES
    places = [(item, start) for item in inputs for start in _starts(item, total)][: 4 * _SAMPLE_STRETCHES]
    texts = []
    for item, start in places:
        for offset, line in Lines(Path(item.path), item.kind, start=start, max_line_bytes=1 << 18):
            if offset > start + stretch:
                break
            try:
                texts += parse_texts(line or b"", keys)
            except RecordError:
                continue  # counted and listed when the run comes to it
    return texts


def distinct_names(inputs: Sequence[Input]) -> list[str]:
    """Base name of each input; equal names get their number among the inputs in front."""
    names = [os.path.basename(item.path) for item in inputs]
    seen = Counter(names)
    return [name if seen[name] == 1 else f"{i}:{name}" for i, name in enumerate(names)]


def check_unchanged(inputs: Sequence[Input]) -> None:
    """Raise MismatchError if a file's size or time of modification is not what it was when the run began."""
    for item in inputs:
        status = os.stat(item.path)
        if (status.st_size, status.st_mtime_ns) != (item.size_bytes, item.modified_ns):
            raise MismatchError(
                f"{item.path}: changed while it was read, from {item.size_bytes} bytes to {status.st_size}; run again "
                "when it is complete"
            )


def _why_nothing(name: str) -> str:
    if name == "-":
        return "standard input; inputs are read more than once, from many places: write it to a file first"
    if "://" in name:
        return "an address; files are read: fetch it, or mount what it is on"
    folder = os.path.dirname(name) or "."
    if not glob.has_magic(folder) and not os.path.isdir(folder):
        return f"no such file: there is no folder {folder}"
    return "no such file, and no file matches it as a glob"


def _glob_of(folder: str) -> str:
    """Glob for the files of a folder, by the ending that most of them have."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    endings = Counter(name[name.index(".", 1) :] for name in names if "." in name[1:])
    ending = endings.most_common(1)[0][0] if endings else ".jsonl"
    return os.path.join(folder, f"*{ending}")


def _starts(item: Input, total: int) -> range:
    if item.kind != "plain":
        return range(1)
    return range(0, max(item.size_bytes, 1), max(total // _SAMPLE_STRETCHES, 1))

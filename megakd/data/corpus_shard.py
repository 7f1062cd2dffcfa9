"""Shard of a corpus in the making: token files, counts and bad records, committed on their own by a manifest.

`megakd preprocess` and `megakd retokenize` cut their input into shards that worker processes encode. A shard
``PREFIX`` is, for each column of documents, ``PREFIX[.COLUMN].bin`` with raw tokens, ``PREFIX[.COLUMN].lengths.npy``
with the int32 length of each document and, where they are known, ``PREFIX[.COLUMN].bytes.npy`` with the int64 bytes of
its text, then ``PREFIX.bad.jsonl`` where a record is bad, and ``PREFIX.json``, the manifest, last: a shard that has its
manifest is whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from megakd.artefacts.durable_files import FileRecord, HashingWriter
from megakd.artefacts.manifest import read_manifest, verify_files, write_manifest
from megakd.data.indexed.concatenate import TokenFile, write_lengths, write_text_bytes
from megakd.data.tokenizer import Tokenizer, TokenizerType, build_tokenizer
from megakd.data.tokenizers.fast import Choice, Engine
from megakd.errors import CorruptError, UsageError

LISTED = 10_000
"""Largest number of bad records, or documents, in the list of a shard and of a whole run; the rest is counted."""
QUARANTINE = ".quarantine.jsonl"
"""Ending of the name of a run's list of bad records."""
WORTH_STOPPING_BYTES = 16 << 20
"""Bytes left to read above which a run that cannot keep its budget stops; with less, it reads on and lists all."""
MAX_SHARDS = 4096
"""Shards that a run makes at most, unless it is told their size."""


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """Settings that decide the ids in a shard, and where it goes; plain data, so that they travel to a worker.

    tokenizer_type, tokenizer_model, vocab_size, eod_token: arguments of `build_tokenizer`. choice: which engine encodes
    (`Choice.as_dict`). folder: unfinished work. max_resident_bytes: bound on a worker's memory, see `Engine`.
    """

    tokenizer_type: TokenizerType
    tokenizer_model: str | None
    vocab_size: int | None
    eod_token: str | None
    append_eod: bool
    choice: dict[str, Any]
    folder: str
    max_resident_bytes: int

    def build_tokenizer(self) -> Tokenizer:
        """Build the reference engine."""
        return build_tokenizer(
            self.tokenizer_type, self.tokenizer_model, vocab_size=self.vocab_size, eod_token=self.eod_token
        )

    def build_engine(self, load_reference: Callable[[], Tokenizer]) -> Engine:
        """Build the engine that was chosen. load_reference: called once, and only if the reference engine is needed."""
        return Engine(
            self.tokenizer_type,
            self.tokenizer_model,
            Choice.from_dict(self.choice),
            load_reference,
            max_resident_bytes=self.max_resident_bytes,
            turns=Path(self.folder) / "turns.lock",
        )


@dataclass
class ShardCounts:
    """Counts of every shard, which add up over shards; each verb adds its own."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0

    def add(self, counts: Self) -> None:
        """Add another shard's counts to these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(counts, field.name))


Counts = TypeVar("Counts", bound=ShardCounts)


@dataclass(frozen=True)
class CorpusShard(Generic[Counts]):
    """A committed shard."""

    counts: Counts
    last: bool
    """True if the input file ends with it; False for shards that know nothing of files."""
    token_files: list[TokenFile]
    """One for each column, in the order of the columns."""
    bad_path: Path | None
    """JSON lines, one for each of the first bad records; None where there is none."""

    def bad_lines(self) -> Iterator[bytes]:
        """Iterate over the lines of ``bad_path``."""
        if self.bad_path is not None:
            with open(self.bad_path, "rb") as stream:
                yield from stream


@dataclass(frozen=True)
class ShardFormat(Generic[Counts]):
    """Format of a verb's shards: its name and version in their manifests, and the class of their counts."""

    name: str
    version: int
    counts: type[Counts]

    def read(self, prefix: Path, columns: Sequence[str], *, verify: bool) -> CorpusShard[Counts] | None:
        """Read the shard that was committed at ``prefix``. columns: infixes of its token files' names.

        None for a shard that was not committed, or, with ``verify``, whose files are not what was committed.
        """
        path = prefix.with_suffix(".json")
        try:
            manifest = read_manifest(path, format=self.name, version=self.version)
            if verify and verify_files(path):
                return None
        except (UsageError, CorruptError):
            return None
        bad, names = _bad_path(prefix), {record.name for record in manifest.files}
        return CorpusShard(
            counts=self.counts(**manifest.parameters["counts"]),
            last=bool(manifest.parameters.get("last")),
            token_files=[_known(_token_file(prefix, column), names) for column in columns],
            bad_path=bad if bad.name in names else None,
        )


class ShardWriter:
    """Writes the shard ``prefix``: token files document by document, the rest in `commit`.

    A context manager: leaving it without a commit removes the token files. columns: as for `ShardFormat.read`.
    dtype: of the tokens on disk. with_bytes: False if the bytes of the texts are not known. Raises NoSpaceError.
    """

    def __init__(self, prefix: Path, columns: Sequence[str], dtype: np.dtype[Any], *, with_bytes: bool = True) -> None:
        self.prefix, self._dtype = prefix, dtype
        self._files = [_token_file(prefix, column) for column in columns]
        self._bins = [HashingWriter(file.bin_path) for file in self._files]
        self._lengths: list[list[NDArray[np.int32]]] = [[np.empty(0, np.int32)] for _ in columns]
        self._text_bytes: list[list[NDArray[np.int64]]] = [[np.empty(0, np.int64)] for _ in columns]
        self._knows_bytes = with_bytes

    def add(
        self,
        column: int,
        tokens: NDArray[Any],
        lengths: NDArray[np.int32],
        text_bytes: NDArray[np.int64] | None,
    ) -> None:
        """Append documents to a column.

        tokens: ``[sum of lengths]`` ids. lengths: ``[num_documents]``. text_bytes: ``[num_documents]``; None in a shard
        that does not know them.
        """
        self._bins[column].write(tokens.astype(self._dtype, copy=False).data)
        self._lengths[column].append(lengths)
        if text_bytes is not None:
            self._text_bytes[column].append(text_bytes)

    def commit(
        self, format: ShardFormat[Counts], counts: Counts, bad: Iterable[bytes], *, last: bool | None = None
    ) -> None:
        """Make the shard durable. bad: JSON lines of its bad records. last: recorded unless it is None."""
        files = []
        for file, tokens, lengths, text_bytes in zip(self._files, self._bins, self._lengths, self._text_bytes):
            files += [tokens.commit(), write_lengths(file.lengths_path, np.concatenate(lengths))]
            if self._knows_bytes and file.bytes_path is not None:
                files.append(write_text_bytes(file.bytes_path, np.concatenate(text_bytes)))
        if (record := _write_lines(_bad_path(self.prefix), bad)) is not None:
            files.append(record)
        write_manifest(
            self.prefix.with_suffix(".json"),
            format=format.name,
            version=format.version,
            parameters={"counts": asdict(counts)} | ({} if last is None else {"last": last}),
            parents={},
            files=files,
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for tokens in self._bins:
            tokens.abort()


def write_quarantine(output_prefix: str, lines: Iterable[bytes]) -> Path:
    """List a run's first bad records in ``PREFIX.quarantine.jsonl``; without any, no such file is left.

    Returns its path. Raises NoSpaceError.
    """
    path = Path(output_prefix + QUARANTINE)
    if _write_lines(path, itertools.islice(lines, LISTED)) is None:
        path.unlink(missing_ok=True)
    return path


def _write_lines(path: Path, lines: Iterable[bytes]) -> FileRecord | None:
    """Write a file of lines; without any, none is written."""
    left = iter(lines)
    first = next(left, None)
    if first is None:
        return None
    with HashingWriter(path) as out:
        for line in itertools.chain([first], left):
            out.write(line)
        return out.commit()


def _token_file(prefix: Path, column: str) -> TokenFile:
    infix = f".{column}" if column else ""
    ends = (f"{infix}.bin", f"{infix}.lengths.npy", f"{infix}.bytes.npy")
    return TokenFile(*(prefix.with_suffix(end) for end in ends))


def _known(file: TokenFile, names: Collection[str]) -> TokenFile:
    """Token file of a shard whose manifest has the files ``names``: its bytes of texts may not be among them."""
    known = file.bytes_path is not None and file.bytes_path.name in names
    return file if known else dataclasses.replace(file, bytes_path=None)


def _bad_path(prefix: Path) -> Path:
    return prefix.with_suffix(".bad.jsonl")

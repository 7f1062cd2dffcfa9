"""Shards: how a corpus is cut, by itself alone, and the encoding of one shard, committed on its own.

Shard ``s`` of a file is the lines that start in bytes ``[s * shard_bytes, (s + 1) * shard_bytes)`` of it, decompressed.
A plain file is entered at any shard; a compressed one is read from its beginning, committing shard after shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.manifest import write_manifest
from megakd.data.indexed.concatenate import write_lengths
from megakd.data.indexed.dataset import TokenFile, best_dtype
from megakd.data.text.decompress import Kind
from megakd.data.text.records import BadRecord, Lines, RecordError, count_duplicate_keys, parse_texts
from megakd.data.tokenizer import TokenizerType, UnencodableError, build_tokenizer
from megakd.data.tokenizers.fast import Choice, Engine
from megakd.errors import CorruptError
from megakd.work.unfinished import LISTED, Tally, bad_records, read_committed

_FORMAT, _FORMAT_VERSION = "preprocess-shard", 2
_BATCH_BYTES = 1 << 20
_REPORTED_BAD = 100  # bad records that a report carries, in case the run stops before the shard is committed


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a shard, plus where it goes; plain data, so that it travels to a worker."""

    paths: list[str]
    kinds: list[Kind]
    json_keys: list[str]
    append_eod: bool
    tokenizer_type: TokenizerType
    tokenizer_model: str | None
    vocab_size: int | None
    num_ids: int
    """The tokenizer's true vocabulary, so that a worker need not load the reference engine to know it."""
    eod: int | None
    eod_text: str | None
    """How that id is written, to count the documents that hold it."""
    choice: dict[str, Any]
    max_doc_bytes: int
    shard_bytes: int
    folder: str
    max_resident_bytes: int

    def build_engine(self) -> Engine:
        """The engine that was chosen."""
        return Engine(
            self.tokenizer_type,
            self.tokenizer_model,
            Choice.from_dict(self.choice),
            lambda: build_tokenizer(self.tokenizer_type, self.tokenizer_model, vocab_size=self.vocab_size),
            max_resident_bytes=self.max_resident_bytes,
            turns=Path(self.folder) / "turns.lock",
        )


@dataclass
class Counts(Tally):
    """What was met."""

    lines: int = 0
    blank_lines: int = 0
    documents: int = 0
    empty_documents: int = 0
    bad_records: int = 0
    duplicate_keys: int = 0
    documents_with_eod_text: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    counts: Counts
    last: bool
    """Whether the file ends with it."""
    parts: list[TokenFile]
    """One for each key, in their order."""
    bad_path: Path | None
    """JSON lines of BadRecord, lines counted within the shard; None where there is none."""


def read_shard(settings: Settings, file: int, shard: int, *, verify: bool) -> Shard | None:
    """A shard that was committed, None for one that was not, or whose files are not what was committed (``verify``)."""
    prefix = _prefix(settings, file, shard)
    manifest = read_committed(prefix, format=_FORMAT, version=_FORMAT_VERSION, verify=verify)
    if manifest is None:
        return None
    keys = range(len(settings.json_keys))
    return Shard(
        counts=Counts(**manifest.parameters["counts"]),
        last=bool(manifest.parameters["last"]),
        parts=[TokenFile(prefix.with_suffix(f".{key}.bin"), prefix.with_suffix(f".{key}.lengths.npy")) for key in keys],
        bad_path=bad_records(manifest),
    )


def encode_shards(
    settings: Settings, engine: Engine, file: int, first: int, report: Callable[[Mapping[str, Any]], object]
) -> None:
    """Encode and commit shard ``first`` of a plain file, or ``first`` and all that follow of a compressed one.

    report: called after each batch with the counts that it added, the ``position`` in the file as it lies on disk, from
    where it was entered, the first of its ``bad`` records, and whether the file has ``ended``.

    Raises CorruptError for a file that is cut or damaged, NoSpaceError.
    """
    path, kind, size = Path(settings.paths[file]), settings.kinds[file], settings.shard_bytes

    def report_skipping() -> None:
        report({**asdict(Counts()), "bad": [], "position": lines.num_bytes_read, "ended": False})

    lines = Lines(path, kind, start=first * size, max_line_bytes=settings.max_doc_bytes, on_skip=report_skipping)
    shard, reader = first, iter(lines)
    pending = next(reader, None)
    while True:
        with _ShardWriter(settings, engine, file, shard) as writer:
            stop = (shard + 1) * size
            while pending is not None and pending[0] < stop:
                writer.add(*pending)
                if writer.batch_bytes >= _BATCH_BYTES:
                    report({**writer.flush(), "position": lines.num_bytes_read, "ended": False})
                pending = next(reader, None)
            report({**writer.flush(), "position": lines.num_bytes_read, "ended": pending is None})
            writer.commit(last=pending is None)
        shard += 1
        if kind == "plain" or pending is None:
            return


class _ShardWriter:
    """Collects the documents of one shard, encodes them batch by batch and commits the files, the manifest last."""

    def __init__(self, settings: Settings, engine: Engine, file: int, shard: int) -> None:
        self._settings, self._engine = settings, engine
        self._prefix = _prefix(settings, file, shard)
        self._keys = settings.json_keys
        self._quoted = [orjson.dumps(key) for key in self._keys]
        self._dtype = best_dtype(settings.num_ids)
        self._eod = np.array([settings.eod] if settings.append_eod else [], dtype=self._dtype)
        self._counts = Counts()
        self._reported = Counts()
        self._bad: list[BadRecord] = []
        self._num_bad_reported = 0
        self._lengths: list[list[NDArray[np.int32]]] = [[] for _ in self._keys]
        self._bins = [HashingWriter(self._bin_path(key)) for key in range(len(self._keys))]
        self._start_batch()

    def _start_batch(self) -> None:
        self.batch_bytes = 0
        self._places: list[tuple[int, int]] = []
        self._texts: list[list[str]] = [[] for _ in self._keys]

    def add(self, offset: int, line: bytes | None) -> None:
        """Take the line that starts at byte ``offset`` of the file; None for one that is too long."""
        self._counts.lines += 1
        self.batch_bytes += self._settings.max_doc_bytes if line is None else len(line)  # bad ones too are progress
        if line is None:
            limit = self._settings.max_doc_bytes
            self._refuse(self._counts.lines, offset, RecordError("too long", f"over --max-doc-bytes {limit}"))
            return
        if line.isspace():
            self._counts.blank_lines += 1
            return
        try:
            texts = parse_texts(line, self._keys)
        except RecordError as error:
            self._refuse(self._counts.lines, offset, error)
            return
        self._counts.duplicate_keys += count_duplicate_keys(line, self._keys, self._quoted)
        written = self._settings.eod_text
        if written is not None and any(written in text for text in texts):
            self._counts.documents_with_eod_text += 1
        for column, text in zip(self._texts, texts):
            column.append(text)
        self._places.append((self._counts.lines, offset))

    def flush(self) -> dict[str, Any]:
        """Encode what was collected. Returns what was counted since the flush before, and ``bad`` records of that."""
        try:
            arrays = [self._engine.encode_arrays(texts) for texts in self._texts]
        except UnencodableError:
            arrays = self._encode_one_by_one()
        for key, documents in enumerate(arrays):
            self._write(key, documents)
        self._counts.documents += len(arrays[0])
        self._start_batch()
        new = {name: count - getattr(self._reported, name) for name, count in asdict(self._counts).items()}
        self._reported = Counts(**asdict(self._counts))
        bad = self._bad[self._num_bad_reported :][:_REPORTED_BAD]
        self._num_bad_reported = len(self._bad)
        return {**new, "bad": [asdict(record) for record in bad]}

    def commit(self, *, last: bool) -> None:
        """Make the shard durable."""
        files = []
        for key, tokens in enumerate(self._bins):
            lengths = np.concatenate(self._lengths[key]) if self._lengths[key] else np.empty(0, dtype=np.int32)
            files += [tokens.commit(), write_lengths(self._lengths_path(key), lengths)]
        if self._bad:
            with HashingWriter(self._prefix.with_suffix(".bad.jsonl")) as out:
                for record in sorted(self._bad, key=lambda bad: bad.line):
                    out.write(orjson.dumps(asdict(record)) + b"\n")
                files.append(out.commit())
        parameters = {"counts": asdict(self._counts), "last": last}
        path = self._prefix.with_suffix(".json")
        write_manifest(path, format=_FORMAT, version=_FORMAT_VERSION, parameters=parameters, parents={}, files=files)

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for tokens in self._bins:
            tokens.abort()

    def _refuse(self, line: int, offset: int, error: RecordError) -> None:
        self._counts.bad_records += 1
        if len(self._bad) < LISTED:
            self._bad.append(BadRecord(line, offset, error.reason, error.detail[:400]))

    def _encode_one_by_one(self) -> list[list[NDArray[np.integer[Any]]]]:
        arrays: list[list[NDArray[np.integer[Any]]]] = [[] for _ in self._keys]
        for place, texts in zip(self._places, zip(*self._texts)):
            try:
                document = [self._engine.encode_arrays([text])[0] for text in texts]
            except UnencodableError as error:
                self._refuse(*place, RecordError("no token ids", str(error)))
                continue
            for column, ids in zip(arrays, document):
                column.append(ids)
        return arrays

    def _write(self, key: int, documents: list[NDArray[np.integer[Any]]]) -> None:
        if not documents:
            return
        lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
        self._counts.empty_documents += int(np.count_nonzero(lengths == 0))
        ends = [piece for ids in documents for piece in (ids, self._eod)] if len(self._eod) else documents
        wide = np.concatenate(ends)
        vocab_size = self._settings.num_ids
        if len(wide) and int(wide.max()) >= vocab_size:
            raise CorruptError(f"{self._prefix}: id {wide.max()} from a tokenizer of {vocab_size}: the model is broken")
        self._bins[key].write(wide.astype(self._dtype, copy=False).data)
        self._lengths[key].append(lengths + np.int32(len(self._eod)))
        self._counts.tokens += len(wide)

    def _bin_path(self, key: int) -> Path:
        return self._prefix.with_suffix(f".{key}.bin")

    def _lengths_path(self, key: int) -> Path:
        return self._prefix.with_suffix(f".{key}.lengths.npy")


def finished_shards(settings: Settings, file: int, *, verify: bool) -> Iterator[Shard | None]:
    """The shards of a file in order, None for one to be done; a compressed file's end where the first is missing."""
    shard = 0
    while True:
        found = read_shard(settings, file, shard, verify=verify)
        yield found
        if found is None and settings.kinds[file] != "plain":
            return
        shard += 1
        if num_shards(settings, file) == shard or (
            found is not None and found.last and settings.kinds[file] != "plain"
        ):
            return


def num_shards(settings: Settings, file: int) -> int | None:
    """How many shards a plain file has; None for a compressed one, which only its end tells."""
    if settings.kinds[file] != "plain":
        return None
    return max(1, -(-Path(settings.paths[file]).stat().st_size // settings.shard_bytes))


def _prefix(settings: Settings, file: int, shard: int) -> Path:
    return Path(settings.folder) / f"{file:06d}-{shard:08d}"

"""Shards of JSON lines: cut by the input files alone, encoded and committed one by one.

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

from megakd.data.corpus_shard import LISTED, CorpusShard, ShardCounts, ShardFormat, ShardSettings, ShardWriter
from megakd.data.indexed.dataset import best_dtype
from megakd.data.text.decompress import Kind
from megakd.data.text.records import BadRecord, Lines, RecordError, count_duplicate_keys, parse_texts
from megakd.data.tokenizer import UnencodableError
from megakd.data.tokenizers.fast import Engine
from megakd.errors import CorruptError

SHARD_VERSION = 3
"""Version of the format of a shard."""
_BATCH_BYTES = 1 << 20
_REPORTED_BAD = 100  # bad records that a report carries, in case the run stops before the shard is committed


@dataclass(frozen=True, kw_only=True)
class TextSettings(ShardSettings):
    """Settings of shards of JSON lines.

    paths, kinds: the input files. num_ids: the tokenizer's true vocabulary, so that a worker need not load the
    reference engine to know it. eod: id that ends documents. eod_text: how that id is written, to count the documents
    that hold it.
    """

    paths: list[str]
    kinds: list[Kind]
    json_keys: list[str]
    num_ids: int
    eod: int | None
    eod_text: str | None
    max_doc_bytes: int
    shard_bytes: int

    @property
    def columns(self) -> list[str]:
        """Names of the columns of documents, one for each key."""
        return [str(column) for column in range(len(self.json_keys))]

    def prefix(self, file: int, shard: int) -> Path:
        """Beginning of the names of a shard's files."""
        return Path(self.folder) / f"{file:06d}-{shard:08d}"

    def num_shards(self, file: int) -> int | None:
        """Number of shards of a plain file; None for a compressed one, which only its end tells."""
        if self.kinds[file] != "plain":
            return None
        return max(1, -(-Path(self.paths[file]).stat().st_size // self.shard_bytes))


@dataclass
class TextCounts(ShardCounts):
    """Counts of a shard of JSON lines."""

    lines: int = 0
    blank_lines: int = 0
    bad_records: int = 0
    duplicate_keys: int = 0
    documents_with_eod_text: int = 0


TextShard = CorpusShard[TextCounts]
"""A shard whose bad records are JSON of `BadRecord`, with lines counted within the shard."""
_FORMAT = ShardFormat("preprocess-shard", SHARD_VERSION, TextCounts)


def finished_shards(settings: TextSettings, file: int, *, verify: bool) -> Iterator[TextShard | None]:
    """Read the shards of a file in order, None for each to be done; in a compressed file only up to the first of these.

    verify: hash the files of each shard; a damaged shard is to be done again.
    """
    plain, num_shards = settings.kinds[file] == "plain", settings.num_shards(file)
    shard = 0
    while True:
        finished = _FORMAT.read(settings.prefix(file, shard), settings.columns, verify=verify)
        yield finished
        shard += 1
        if shard == num_shards or (not plain and (finished is None or finished.last)):
            return


def encode_shards(
    settings: TextSettings, engine: Engine, file: int, first: int, report: Callable[[Mapping[str, Any]], object]
) -> None:
    """Encode and commit shard ``first`` of a plain file, or ``first`` and all that follow of a compressed one.

    report: called after each batch with the counts that it added; ``position``, bytes read of the file on disk since
    it was entered; ``bad``, the first bad records of the batch; and ``ended``, whether the file has ended.

    Raises CorruptError for a file that is cut or damaged, NoSpaceError.
    """
    path, kind, size = Path(settings.paths[file]), settings.kinds[file], settings.shard_bytes

    def report_skipping() -> None:
        report({**asdict(TextCounts()), "bad": [], "position": lines.num_bytes_read, "ended": False})

    lines = Lines(path, kind, start=first * size, max_line_bytes=settings.max_doc_bytes, on_skip=report_skipping)
    shard, reader, dtype = first, iter(lines), best_dtype(settings.num_ids)
    pending = next(reader, None)
    while True:
        with ShardWriter(settings.prefix(file, shard), settings.columns, dtype) as out:
            documents = _Documents(settings, engine, out)
            stop = (shard + 1) * size
            while pending is not None and pending[0] < stop:
                documents.add(*pending)
                if documents.batch_bytes >= _BATCH_BYTES:
                    report({**documents.flush(), "position": lines.num_bytes_read, "ended": False})
                pending = next(reader, None)
            report({**documents.flush(), "position": lines.num_bytes_read, "ended": pending is None})
            out.commit(_FORMAT, documents.counts, documents.bad_lines(), last=pending is None)
        shard += 1
        if kind == "plain" or pending is None:
            return


class _Documents:
    """The documents of one shard, collected line by line and encoded batch by batch."""

    def __init__(self, settings: TextSettings, engine: Engine, out: ShardWriter) -> None:
        self._settings, self._engine, self._out = settings, engine, out
        self._keys = settings.json_keys
        self._quoted = [orjson.dumps(key) for key in self._keys]
        self._eod = np.array([settings.eod] if settings.append_eod else [], dtype=best_dtype(settings.num_ids))
        self.counts = TextCounts()
        self._reported = TextCounts()
        self._bad: list[BadRecord] = []
        self._num_bad_reported = 0
        self._start_batch()

    def _start_batch(self) -> None:
        self.batch_bytes = 0
        self._places: list[tuple[int, int]] = []
        self._texts: list[list[str]] = [[] for _ in self._keys]

    def add(self, offset: int, line: bytes | None) -> None:
        """Add the line that starts at byte ``offset`` of the file; ``line`` is None for one that is too long."""
        self.counts.lines += 1
        self.batch_bytes += (
            self._settings.max_doc_bytes if line is None else len(line)
        )  # bad lines count as progress, too
        if line is None:
            limit = self._settings.max_doc_bytes
            self._refuse(self.counts.lines, offset, RecordError("too long", f"over --max-doc-bytes {limit}"))
            return
        if line.isspace():
            self.counts.blank_lines += 1
            return
        try:
            texts = parse_texts(line, self._keys)
        except RecordError as error:
            self._refuse(self.counts.lines, offset, error)
            return
        self.counts.duplicate_keys += count_duplicate_keys(line, self._keys, self._quoted)
        written = self._settings.eod_text
        if written is not None and any(written in text for text in texts):
            self.counts.documents_with_eod_text += 1
        for column, text in zip(self._texts, texts):
            column.append(text)
        self._places.append((self.counts.lines, offset))

    def flush(self) -> dict[str, Any]:
        """Encode the collected documents; returns the counts since the last flush, and ``bad``, records among them."""
        kept: list[int] | None = None
        try:
            arrays = [self._engine.encode_arrays(texts) for texts in self._texts]
        except UnencodableError:
            arrays, kept = self._encode_one_by_one()
        for column, documents in enumerate(arrays):
            texts = self._texts[column] if kept is None else [self._texts[column][place] for place in kept]
            # behind the engine, which leaves each text's UTF-8 with it: then this copies, and does not encode again
            sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
            self._write(column, documents, sizes)
        self.counts.documents += len(arrays[0])
        self._start_batch()
        new = {name: count - getattr(self._reported, name) for name, count in asdict(self.counts).items()}
        self._reported = TextCounts(**asdict(self.counts))
        bad = self._bad[self._num_bad_reported :][:_REPORTED_BAD]
        self._num_bad_reported = len(self._bad)
        return {**new, "bad": [asdict(record) for record in bad]}

    def bad_lines(self) -> list[bytes]:
        """JSON of the first bad records, in the order of their lines."""
        return [orjson.dumps(asdict(bad)) + b"\n" for bad in sorted(self._bad, key=lambda bad: bad.line)]

    def _refuse(self, line: int, offset: int, error: RecordError) -> None:
        self.counts.bad_records += 1
        if len(self._bad) < LISTED:
            self._bad.append(BadRecord(line, offset, error.reason, error.detail[:400]))

    def _encode_one_by_one(self) -> tuple[list[list[NDArray[np.integer[Any]]]], list[int]]:
        """Encode the documents that have ids; returns the ids, column by column, and the places of these documents."""
        arrays: list[list[NDArray[np.integer[Any]]]] = [[] for _ in self._keys]
        kept = []
        for number, (place, texts) in enumerate(zip(self._places, zip(*self._texts))):
            try:
                document = [self._engine.encode_arrays([text])[0] for text in texts]
            except UnencodableError as error:
                self._refuse(*place, RecordError("no token ids", str(error)))
                continue
            kept.append(number)
            for column, ids in zip(arrays, document):
                column.append(ids)
        return arrays, kept

    def _write(self, column: int, documents: list[NDArray[np.integer[Any]]], text_bytes: list[int]) -> None:
        if not documents:
            return
        lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
        self.counts.empty_documents += int(np.count_nonzero(lengths == 0))
        ended = [ids for document in documents for ids in (document, self._eod)] if len(self._eod) else documents
        tokens = np.concatenate(ended)
        num_ids = self._settings.num_ids
        if len(tokens) and int(tokens.max()) >= num_ids:
            raise CorruptError(
                f"{self._out.prefix}: id {tokens.max()} from a tokenizer of {num_ids}: the model is broken"
            )
        self._out.add(column, tokens, lengths + np.int32(len(self._eod)), np.array(text_bytes, dtype=np.int64))
        self.counts.tokens += len(tokens)

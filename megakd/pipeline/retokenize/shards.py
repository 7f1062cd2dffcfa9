"""Shards of a dataset under another tokenizer: ranges of documents, each decoded, encoded and committed on its own.

A document is taken apart at its end-of-document tokens, which have no text: they stay where they were, as the other
tokenizer's. So no two texts run into one another, and what is encoded is exactly what was decoded.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from megakd.artefacts.durable_files import HashingWriter
from megakd.artefacts.manifest import write_manifest
from megakd.data.indexed.concatenate import write_lengths
from megakd.data.indexed.dataset import IndexedDataset, TokenFile, best_dtype
from megakd.data.tokenizer import Tokenizer, TokenizerType, UnencodableError, build_tokenizer
from megakd.data.tokenizers.fast import Choice, Engine
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import CorruptError, UsageError
from megakd.work.unfinished import LISTED, Tally, bad_records, read_committed

_FORMAT, _FORMAT_VERSION = "retokenize-shard", 1
_BATCH_TOKENS = 1 << 18
# What decoders write for ids that are no text: half a character, and sentencepiece's unknown token.
_NO_TEXT = ("\ufffd", "\u2047")


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a shard, and where it goes; plain data, so that it travels to a worker."""

    prefix: str
    fingerprint: str
    source_type: TokenizerType | None
    source_model: str | None
    source_vocab_size: int | None
    target_type: TokenizerType
    target_model: str | None
    target_eod_token: str | None
    append_eod: bool
    choice: dict[str, Any]
    folder: str
    max_resident_bytes: int

    def open_source(self) -> tuple[IndexedDataset, Tokenizer]:
        """The dataset and its tokenizer."""
        dataset = IndexedDataset(self.prefix, expect_fingerprint=self.fingerprint)
        tokenizer = open_tokenizer(
            dataset,
            tokenizer_type=self.source_type,
            tokenizer_model=self.source_model,
            vocab_size=self.source_vocab_size,
            flag_prefix="--source-",
        )
        return dataset, tokenizer


@dataclass
class Counts(Tally):
    """What was met.

    normalised: documents whose text the new tokens do not give back byte for byte. undecodable: those whose old tokens
    are not all text, such as half a character at a sample's edge. Such documents are kept as they decode; bad_documents
    are those of either kind. source_bytes, target_bytes: UTF-8 bytes that the old and the new tokens decode to.
    """

    documents: int = 0
    empty_documents: int = 0
    bad_documents: int = 0
    normalised: int = 0
    undecodable: int = 0
    source_tokens: int = 0
    tokens: int = 0
    source_bytes: int = 0
    target_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """A finished shard."""

    counts: Counts
    part: TokenFile
    bad_path: Path | None
    """JSON lines: ``document``, ``reason``, ``detail``; None where there is none."""


def document_ranges(dataset: IndexedDataset, shard_tokens: int) -> list[tuple[int, int]]:
    """First and last + 1 of the documents of each shard: those that start in its ``shard_tokens`` of the stream."""
    firsts = [
        bisect.bisect_left(range(dataset.num_documents), position, key=dataset.document_start)
        for position in range(0, max(dataset.num_tokens, 1), shard_tokens)
    ]
    return [(first, stop) for first, stop in zip(firsts, [*firsts[1:], dataset.num_documents]) if stop > first]


def read_shard(folder: str, shard: int, *, verify: bool) -> Shard | None:
    """A shard that was committed; None for one that was not, or whose files are not what was committed (``verify``)."""
    prefix = _prefix(folder, shard)
    manifest = read_committed(prefix, format=_FORMAT, version=_FORMAT_VERSION, verify=verify)
    if manifest is None:
        return None
    return Shard(
        counts=Counts(**manifest.parameters["counts"]),
        part=TokenFile(prefix.with_suffix(".bin"), prefix.with_suffix(".lengths.npy")),
        bad_path=bad_records(manifest),
    )


class Retokenizer:
    """Everything that a shard needs, loaded once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dataset, self._source = settings.open_source()
        self._target = build_tokenizer(settings.target_type, settings.target_model, eod_token=settings.target_eod_token)
        self._engine = Engine(
            settings.target_type,
            settings.target_model,
            Choice.from_dict(settings.choice),
            lambda: self._target,
            max_resident_bytes=settings.max_resident_bytes,
            turns=Path(settings.folder) / "turns.lock",
        )
        self._dtype = best_dtype(self._target.vocab_size)

    def encode_shard(self, shard: int, first: int, stop: int, report: Callable[[Mapping[str, int]], object]) -> None:
        """Retokenize documents ``first`` to ``stop`` and commit them. report: called after each batch with its counts.

        Raises CorruptError for ids beyond the tokenizer, UsageError for a text that the new one has no ids for,
        NoSpaceError.
        """
        prefix = _prefix(self._settings.folder, shard)
        counts, lengths = Counts(), [np.empty(0, dtype="<i4")]
        bad: list[bytes] = []
        with HashingWriter(prefix.with_suffix(".bin")) as out:
            for batch in self._batches(first, stop):
                added = Counts()
                documents = self._encode(batch, added, bad)
                out.write(np.concatenate(documents).astype(self._dtype, copy=False).data)
                lengths.append(np.array([len(ids) for ids in documents], dtype="<i4"))
                counts.add(added)
                report(asdict(added))
            files = [out.commit(), write_lengths(prefix.with_suffix(".lengths.npy"), np.concatenate(lengths))]
        if bad:
            with HashingWriter(prefix.with_suffix(".bad.jsonl")) as out:
                out.write(b"".join(bad))
                files.append(out.commit())
        write_manifest(
            prefix.with_suffix(".json"),
            format=_FORMAT,
            version=_FORMAT_VERSION,
            parameters={"counts": asdict(counts)},
            parents={},
            files=files,
        )

    def _batches(self, first: int, stop: int) -> Iterator[list[_Document]]:
        batch: list[_Document] = []
        size = 0
        for number in range(first, stop):
            batch.append(self._decode(number))
            size += batch[-1].num_tokens
            if size >= _BATCH_TOKENS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _decode(self, number: int) -> _Document:
        ids = self._dataset.document(number)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._source.vocab_size:
            raise CorruptError(
                f"{self._settings.prefix}: document {number} has ids from {ids.min()} to {ids.max()}, its tokenizer "
                f"has {self._source.vocab_size}"
            )
        ends = [] if self._source.eod is None else np.flatnonzero(ids == self._source.eod).tolist()
        pieces = [ids[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(ids)])]
        return _Document(
            number, len(ids), pieces, [self._source.decode(piece.tolist()) if len(piece) else "" for piece in pieces]
        )

    def _encode(self, batch: Sequence[_Document], counts: Counts, bad: list[bytes]) -> list[NDArray[Any]]:
        texts = [text for document in batch for text in document.texts]
        arrays = iter(self._encode_texts(batch, texts))
        encoded = []
        for document in batch:
            pieces = [next(arrays) for _ in document.texts]
            backs = [self._target.decode(piece.tolist()) if len(piece) else "" for piece in pieces]
            self._count(document, backs, counts, bad)
            ids = self._join(pieces, document.texts)
            counts.tokens += len(ids)
            counts.empty_documents += not any(document.texts)
            encoded.append(ids)
        return encoded

    def _encode_texts(self, batch: Sequence[_Document], texts: list[str]) -> list[NDArray[Any]]:
        try:
            return self._engine.encode_arrays(texts)
        except UnencodableError as error:
            raise UsageError(
                f"{self._settings.prefix}: documents {batch[0].number} to {batch[-1].number}: "
                f"{self._settings.target_type} has no ids for their text: {error}"
            ) from error

    def _join(self, pieces: list[NDArray[Any]], texts: list[str]) -> NDArray[Any]:
        eod = np.array([self._target.eod], dtype=np.int64)
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += [eod, piece]
        if self._settings.append_eod and (len(texts) == 1 or texts[-1]):
            parts.append(eod)
        return np.concatenate(parts).astype(np.int64, copy=False)

    def _count(self, document: _Document, backs: list[str], counts: Counts, bad: list[bytes]) -> None:
        lost = sum(not self._is_text(text, ids) for text, ids in zip(document.texts, document.pieces))
        changed = [place for place, (text, back) in enumerate(zip(document.texts, backs)) if text != back]
        counts.documents += 1
        counts.source_tokens += document.num_tokens
        counts.source_bytes += sum(len(text.encode()) for text in document.texts)
        counts.target_bytes += sum(len(back.encode()) for back in backs)
        counts.undecodable += lost > 0
        counts.normalised += len(changed) > 0
        if lost or changed:
            counts.bad_documents += 1
            reason = "undecodable" if lost else "normalised"
            detail = _first_difference(document.texts[changed[0]], backs[changed[0]]) if changed else ""
            if len(bad) < LISTED:
                bad.append(orjson.dumps({"document": document.number, "reason": reason, "detail": detail}) + b"\n")

    def _is_text(self, text: str, ids: NDArray[Any]) -> bool:
        """Whether the ids were text: what looks like a decoder's stopgap is none where it encodes to them again.

        Bytes are no way to tell: three of a character's four decode to a replacement character, which has three.
        """
        return not any(mark in text for mark in _NO_TEXT) or self._source.encode(text) == ids.tolist()


@dataclass(frozen=True)
class _Document:
    number: int
    num_tokens: int
    pieces: list[NDArray[Any]]
    """Its ids between the ends of documents; one piece more than there are of these."""
    texts: list[str]
    """Of each piece."""


def _first_difference(text: str, back: str) -> str:
    place = next((i for i, (one, other) in enumerate(zip(text, back)) if one != other), min(len(text), len(back)))
    near = slice(max(0, place - 8), place + 24)
    return f"at character {place}: {text[near]!r} comes back as {back[near]!r}"


def _prefix(folder: str, shard: int) -> Path:
    return Path(folder) / f"{shard:08d}"

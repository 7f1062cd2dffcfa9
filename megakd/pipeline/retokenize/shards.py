"""Shards of a dataset under another tokenizer: ranges of documents, decoded, encoded and committed one by one.

A document is cut at its end-of-document tokens, which have no text; the new tokenizer's take their places. So no two
texts run into one another, and the encoded text is exactly the decoded one.
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

from megakd.data.corpus_shard import LISTED, CorpusShard, ShardCounts, ShardFormat, ShardSettings, ShardWriter
from megakd.data.indexed.dataset import IndexedDataset, best_dtype
from megakd.data.tokenizer import Tokenizer, TokenizerType, UnencodableError
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import CorruptError, UsageError

SHARD_VERSION = 2
"""Version of the format of a shard."""
_BATCH_TOKENS = 1 << 18
# Marks that decoders write for ids that are no text: half a character, and sentencepiece's unknown token.
_NO_TEXT = ("\ufffd", "\u2047")
_COLUMNS = ("",)


@dataclass(frozen=True, kw_only=True)
class RetokenizeSettings(ShardSettings):
    """Settings of shards of a dataset: `ShardSettings` of the new tokenizer, the dataset, and its own tokenizer.

    prefix, fingerprint: the dataset. source_type, source_model, source_vocab_size: its tokenizer, as flags give it;
    None for what its manifest records.
    """

    prefix: str
    fingerprint: str
    source_type: TokenizerType | None
    source_model: str | None
    source_vocab_size: int | None

    def open_source(self) -> tuple[IndexedDataset, Tokenizer]:
        """Open the dataset and its tokenizer."""
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
class RetokenizeCounts(ShardCounts):
    """Counts of a shard of documents.

    normalised: documents whose text the new tokens do not decode to, byte for byte. undecodable: documents whose old
    tokens are not all text, such as half a character at a sample's edge; they are kept as they decode. bad_documents:
    documents of either kind. source_bytes, target_bytes: UTF-8 bytes to which the old and the new tokens decode.
    """

    bad_documents: int = 0
    normalised: int = 0
    undecodable: int = 0
    source_tokens: int = 0
    source_bytes: int = 0
    target_bytes: int = 0


RetokenizedShard = CorpusShard[RetokenizeCounts]
"""A shard whose bad records are JSON of ``document``, ``reason`` and ``detail``."""
_FORMAT = ShardFormat("retokenize-shard", SHARD_VERSION, RetokenizeCounts)


def document_ranges(dataset: IndexedDataset, shard_tokens: int) -> list[tuple[int, int]]:
    """First document of each shard, and the one after its last; a document belongs where its first token lies."""
    firsts = [
        bisect.bisect_left(range(dataset.num_documents), position, key=dataset.document_start)
        for position in range(0, max(dataset.num_tokens, 1), shard_tokens)
    ]
    return [(first, stop) for first, stop in zip(firsts, [*firsts[1:], dataset.num_documents]) if stop > first]


def read_shard(folder: str, shard: int, *, verify: bool) -> RetokenizedShard | None:
    """Read a shard that was committed; None where none was, or, with ``verify``, where its files have changed."""
    return _FORMAT.read(_prefix(folder, shard), _COLUMNS, verify=verify)


class Retokenizer:
    """Encoder of shards: the dataset, both tokenizers and the engine, loaded once."""

    def __init__(self, settings: RetokenizeSettings) -> None:
        self._settings = settings
        self._dataset, self._source = settings.open_source()
        self._target = settings.build_tokenizer()
        self._engine = settings.build_engine(lambda: self._target)
        self._dtype = best_dtype(self._target.vocab_size)

    def encode_shard(self, shard: int, first: int, stop: int, report: Callable[[Mapping[str, int]], object]) -> None:
        """Retokenize documents ``first`` to ``stop`` and commit them. report: called after each batch with its counts.

        Raises CorruptError for ids beyond the tokenizer, UsageError for a text that the new one has no ids for,
        NoSpaceError.
        """
        counts = RetokenizeCounts()
        bad: list[bytes] = []
        sizes, prefix = self._dataset.text_bytes, _prefix(self._settings.folder, shard)
        with ShardWriter(prefix, _COLUMNS, self._dtype, with_bytes=sizes is not None) as out:
            for batch in self._batches(first, stop):
                added = RetokenizeCounts()
                documents = self._encode(batch, added, bad)
                lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
                of_batch = None if sizes is None else sizes[batch[0].number : batch[-1].number + 1]
                out.add(0, np.concatenate(documents), lengths, of_batch)
                counts.add(added)
                report(asdict(added))
            out.commit(_FORMAT, counts, bad)

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

    def _encode(self, batch: Sequence[_Document], counts: RetokenizeCounts, bad: list[bytes]) -> list[NDArray[Any]]:
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
                f"{self._settings.tokenizer_type} has no ids for their text: {error}"
            ) from error

    def _join(self, pieces: list[NDArray[Any]], texts: list[str]) -> NDArray[Any]:
        eod = np.array([self._target.eod], dtype=np.int64)
        parts = [pieces[0]]
        for piece in pieces[1:]:
            parts += [eod, piece]
        if self._settings.append_eod and (len(texts) == 1 or texts[-1]):
            parts.append(eod)
        return np.concatenate(parts).astype(np.int64, copy=False)

    def _count(self, document: _Document, backs: list[str], counts: RetokenizeCounts, bad: list[bytes]) -> None:
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
        """Return whether the ids were text: without a mark of ``_NO_TEXT``, or encoded to the same ids again.

        Numbers of bytes would not show it: three of a character's four bytes decode to U+FFFD, which has three.
        """
        return not any(mark in text for mark in _NO_TEXT) or self._source.encode(text) == ids.tolist()


@dataclass(frozen=True)
class _Document:
    number: int
    num_tokens: int
    pieces: list[NDArray[Any]]
    """Ids between the end-of-document tokens; one piece more than there are such tokens."""
    texts: list[str]
    """Text of each piece."""


def _first_difference(text: str, back: str) -> str:
    place = next((i for i, (before, after) in enumerate(zip(text, back)) if before != after), min(len(text), len(back)))
    near = slice(max(0, place - 8), place + 24)
    return f"at character {place}: {text[near]!r} comes back as {back[near]!r}"


def _prefix(folder: str, shard: int) -> Path:
    return Path(folder) / f"{shard:08d}"

"""What a tokenizer is to everything else: text to ids and back, with an identity that manifests record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.errors import UsageError

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"]


class UnencodableError(ValueError):
    """A text that the tokenizer has no ids for; the message says why."""


@dataclass(frozen=True)
class Ragged:
    """Documents one after the other."""

    tokens: NDArray[np.integer[Any]]
    """``[sum(lengths)]``"""
    lengths: NDArray[np.int32]
    """``[num_documents]``, tokens in each."""


class Tokenizer(ABC):
    """Text to ids and back. ``encode`` adds no token of its own, neither at the start nor at the end."""

    type: TokenizerType
    path: Path | None
    vocab_size: int
    """The true size: one more than the largest id. Padding for tensor parallelism is the model's affair."""
    eod: int | None
    """The id that ends a document, None where the model names none."""
    eod_token: str | None = None
    """How that id is written; None where it has no text of its own."""
    eod_reason: str = "the id after the last one"
    """Where it comes from."""
    eod_warnings: tuple[str, ...] = ()
    """Why it may be the wrong one: one sentence each."""
    literals: tuple[str, ...] = ()
    """Texts of control, special and added tokens: what engines disagree about when it is written out in a document."""
    white_literals: frozenset[str] = frozenset()
    """Those of white space alone that are found wherever they stand: half of all documents hold one."""
    normalised_literals: tuple[str, ...] = ()
    """Those that are looked for in the text as the tokenizer normalises it."""
    normalises: bool = True
    """Whether it may rewrite a text before it looks at it."""
    notes: tuple[str, ...] = ()
    """What a user should know about the model: one sentence each."""

    def __init__(self, content: bytes) -> None:
        """content: what gives every text its ids, and documents their end."""
        self.hash = self._hash(content)
        """XXH3-128 of the type and the model's bytes."""

    def end_documents_with(self, token: str | int) -> None:
        """Take another end-of-document token: as it is written, or by its id.

        Raises UsageError for one that the vocabulary has not, or that is a piece of ordinary text.
        """
        i = self.token_id(token) if isinstance(token, str) else token
        name = f"--eod-token {token!r}"
        if self.path is None:
            raise UsageError(f"{name}: {self.type} ends documents with its own id {self.eod}; leave the flag out")
        known = f"expected one of {', '.join(self.literals[:12])}" + (" ..." if len(self.literals) > 12 else "")
        if i is None or not 0 <= i < self.vocab_size:
            raise UsageError(f"{name}: not in the vocabulary of {self.path}; {known}")
        if isinstance(token, str) and token not in self.literals:
            raise UsageError(f"{name}: a piece of ordinary text to {self.path}, no special token; {known}")
        self.eod, self.eod_token = i, self._token_of(i)
        self.eod_reason, self.eod_warnings = "--eod-token" if isinstance(token, str) else "as recorded", ()
        self.hash = self._hash(self._identity())

    def token_id(self, token: str) -> int | None:
        """The id of a token as it is written; None where there is none."""
        return None

    def _token_of(self, i: int) -> str:
        raise NotImplementedError

    def _identity(self) -> bytes:
        raise NotImplementedError

    def _hash(self, content: bytes) -> str:
        return xxhash.xxh3_128_hexdigest(self.type.encode() + b"\0" + content)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises UnencodableError."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens stand for nothing."""

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int32]:
        """``[vocab_size]``: UTF-8 bytes of text each id stands for, 0 for control tokens; makes bits per byte."""

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """The ids of each text, one array a text. Raises UnencodableError."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """The ids of each text, one after the other. Raises UnencodableError."""
        arrays = self.encode_arrays(texts)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return Ragged(tokens, np.array([len(array) for array in arrays], dtype=np.int32))

    def explain_eod(self) -> str:
        """Which id ends a document, and why, for people."""
        if self.eod is None:
            return f"end of document: {self.path} names none (no eos_token); --eod-token does"
        written = "" if self.eod_token is None else f"{self.eod_token}, "
        return f"end of document: {written}id {self.eod} ({self.eod_reason})"

    def describe(self) -> dict[str, Any]:
        """What a manifest records; ``path`` is a hint for people."""
        return {
            "type": self.type,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "path": None if self.path is None else str(self.path),
        }


def same_tokenizer(one: Mapping[str, Any] | Tokenizer, other: Mapping[str, Any] | Tokenizer) -> bool:
    """Whether two tokenizers, or their records in manifests, give every text the same ids: same type, same model."""
    first, second = (each.describe() if isinstance(each, Tokenizer) else each for each in (one, other))
    return all(first[key] == second[key] for key in ("type", "hash", "vocab_size", "eod"))


def name_tokenizer(tokenizer: Mapping[str, Any] | Tokenizer) -> str:
    """Which it is, for messages."""
    record = tokenizer.describe() if isinstance(tokenizer, Tokenizer) else tokenizer
    return f"{record.get('type')} {record.get('hash')} (vocabulary {record.get('vocab_size')})"

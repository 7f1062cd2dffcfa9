"""The interface of tokenizers: text to ids and back, with an identity that manifests record."""

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
    """Ids of documents, one after the other."""

    tokens: NDArray[np.integer[Any]]
    """``[sum(lengths)]``: all ids."""
    lengths: NDArray[np.int32]
    """``[num_documents]`` int32: tokens in each document."""


class Tokenizer(ABC):
    """Text to ids and back. ``encode`` adds no token of its own, neither at the start nor at the end."""

    type: TokenizerType
    path: Path | None
    vocab_size: int
    """True size: one more than the largest id, without the padding that a model adds for tensor parallelism."""
    eod: int | None
    """Id that ends a document; None where the model names none."""
    bos: int | None = None
    """Id that begins a text, by the model's own files; None where they name none."""
    eod_token: str | None = None
    """Text of that id; None where it has no text of its own."""
    eod_reason: str = "the id after the last one"
    """Origin of that id, for people."""
    eod_warnings: tuple[str, ...] = ()
    """Reasons why that id may be the wrong one, a sentence each."""
    literals: tuple[str, ...] = ()
    """Texts of control, special and added tokens: engines disagree about documents that hold them."""
    white_literals: frozenset[str] = frozenset()
    """Literals of white space alone that are taken wherever they stand: half of all documents hold one."""
    normalised_literals: tuple[str, ...] = ()
    """Literals that are looked for in the normalised text."""
    normalises: bool = True
    """True if the tokenizer may rewrite a text before it cuts it."""
    notes: tuple[str, ...] = ()
    """Notes about the model for its user, a sentence each."""

    def __init__(self, content: bytes) -> None:
        """content: bytes that determine the ids of every text and the end of documents."""
        self.hash = self._hash(content)
        """XXH3-128, in hexadecimal, of the type and the content."""

    def end_documents_with(self, token: str | int) -> None:
        """Take another end-of-document token, by its text or by its id.

        Raises UsageError for a token that is not in the vocabulary, or that is a piece of ordinary text.
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
        """Id of the token with this text; None where there is none."""
        return None

    def _token_of(self, i: int) -> str:
        raise NotImplementedError

    def _identity(self) -> bytes:
        raise NotImplementedError

    def _hash(self, content: bytes) -> str:
        return xxhash.xxh3_128_hexdigest(self.type.encode() + b"\0" + content)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode a text as ids. Raises UnencodableError."""

    def encode_in_template(self, text: str) -> list[int]:
        """Encode a text with the tokens that the model's own template puts around it, such as one that begins a text.

        Equal to `encode` where there is no template. Raises UnencodableError.
        """
        return self.encode(text)

    def text_of(self, i: int) -> str:
        """Text of one id, control tokens included; empty where it has none."""
        return self.decode([i])

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text; control tokens become nothing."""

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int32]:
        """``[vocab_size]`` int32: UTF-8 bytes of the text that each id decodes to, 0 for control tokens.

        A text may have had more, or fewer: a tokenizer that normalises, drops white space or has an unknown id does not
        give it back. The bytes of a document's text are `IndexedDataset.text_bytes`.
        """

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        """Encode each text as an array of ids. Raises UnencodableError."""
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def encode_batch(self, texts: Sequence[str]) -> Ragged:
        """Encode texts as ids that lie one after the other. Raises UnencodableError."""
        arrays = self.encode_arrays(texts)
        tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32)
        return Ragged(tokens, np.array([len(array) for array in arrays], dtype=np.int32))

    def explain_eod(self) -> str:
        """Explain which id ends a document, and why, for people."""
        if self.eod is None:
            return f"end of document: {self.path} names none (no eos_token); --eod-token does"
        written = "" if self.eod_token is None else f"{self.eod_token}, "
        return f"end of document: {written}id {self.eod} ({self.eod_reason})"

    def describe(self) -> dict[str, Any]:
        """Record for a manifest: type, hash, vocab_size, eod; ``path`` is a hint for people."""
        return {
            "type": self.type,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "path": None if self.path is None else str(self.path),
        }


def same_tokenizer(first: Mapping[str, Any] | Tokenizer, second: Mapping[str, Any] | Tokenizer) -> bool:
    """Return whether two tokenizers, or their records in manifests, give every text the same ids.

    They do if type, model and end-of-document id are the same.
    """
    first_record, second_record = _record_of(first), _record_of(second)
    return all(first_record[key] == second_record[key] for key in ("type", "hash", "vocab_size", "eod"))


def name_tokenizer(tokenizer: Mapping[str, Any] | Tokenizer) -> str:
    """Name a tokenizer, or its record in a manifest, for messages."""
    record = _record_of(tokenizer)
    return f"{record.get('type')} {record.get('hash')} (vocabulary {record.get('vocab_size')})"


def _record_of(tokenizer: Mapping[str, Any] | Tokenizer) -> Mapping[str, Any]:
    return tokenizer.describe() if isinstance(tokenizer, Tokenizer) else tokenizer

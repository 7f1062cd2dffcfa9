"""Tokenizers of a ``tokenizer.json``, by the package `tokenizers`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.tokenizers.base import Tokenizer, TokenizerType
from megakd.data.tokenizers.end_of_document import find_begin_of_text, find_end_of_document
from megakd.errors import UsageError

_PIECE_TEXT_BYTES = 128 * 1024  # text for one call of `tokenizers`, which takes some 200 bytes of memory for each byte
# The value is a fraction, or 1: in a vocabulary, where "dropout" may be a word, it is its id.
_DROPOUT = re.compile(rb'"dropout"\s*:\s*([0-9]*\.[0-9]|[0-9.]+[eE]|1\s*[,}])')


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``. A special token written out in a text becomes that token.

    Documents end with the token that `find_end_of_document` finds beside the file.
    """

    type: TokenizerType = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        self.path = path
        model_bytes = path.read_bytes()
        try:
            self.content = without_dropout(model_bytes)
            self._engine = load_engine(self.content)
        except ValueError as error:
            raise UsageError(f"{path}: not a tokenizer.json: {error}") from error
        if self.content is not model_bytes:
            self.notes = (f"{path}: its dropout, which makes other ids at every run, is switched off",)
        added = self._engine.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        tokens = [token for token in added.values() if token.content]
        self.literals = tuple(token.content for token in tokens)
        self.white_literals = frozenset(
            token.content
            for token in tokens
            if token.content.isspace() and not (token.single_word or token.lstrip or token.rstrip)
        )
        self.normalises = self._engine.normalizer is not None
        self.normalised_literals = tuple(token.content for token in tokens if token.normalized and self.normalises)
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1)
        end = find_end_of_document(
            path.parent,
            token_of=self._engine.id_to_token,
            special={token.content for token in tokens if token.special},
            vocabulary=self._engine.get_vocab(with_added_tokens=True),
        )
        self.eod = None
        if end is not None:
            self.eod, self.eod_token, self.eod_reason = self._engine.token_to_id(end.token), end.token, end.reason
            if self.eod is None:
                raise UsageError(f"{path.parent}: eos_token {end.token!r} is not in the vocabulary of {path.name}")
            self.eod_warnings = end.warnings
        begin = find_begin_of_text(path.parent)
        self.bos = None if begin is None else self._engine.token_to_id(begin)
        self._model_bytes = model_bytes
        super().__init__(self._identity())

    def token_id(self, token: str) -> int | None:
        i: int | None = self._engine.token_to_id(token)
        return i

    def _token_of(self, i: int) -> str:
        return str(self._engine.id_to_token(i))

    def _identity(self) -> bytes:
        return self._model_bytes + b"\0" + str(self.eod).encode()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def encode_in_template(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text, add_special_tokens=True).ids
        return ids

    def text_of(self, i: int) -> str:
        return str(self._engine.decode([i], skip_special_tokens=False))

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        return encode_with(self._engine, texts)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._engine.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def token_bytes(self) -> NDArray[np.int32]:
        model = json.loads(self._engine.to_str())
        # a file may lack the decoder, and its pieces are written in the byte-level alphabet all the same
        byte_level = any("ByteLevel" in json.dumps(model.get(part)) for part in ("decoder", "pre_tokenizer"))
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        added = self._engine.get_added_tokens_decoder()
        for piece, i in self._engine.get_vocab(with_added_tokens=True).items():
            if i in self._special_ids:
                continue
            if byte_level and i not in added:
                sizes[i] = len(piece)  # the byte-level alphabet has one character a byte
            elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                sizes[i] = 1
            else:
                sizes[i] = len(piece.replace("▁", " ").encode())
        return sizes


def load_engine(content: bytes) -> Any:
    """Load the engine of a tokenizer.json's content; it truncates and pads nothing. Raises ValueError."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # documents are spread over processes
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_str(content.decode())
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, ValueError):
            raise  # the package raises bare Exception for a file that it cannot read; anything else is a fault
        raise ValueError(str(error)) from error
    engine.no_truncation()
    engine.no_padding()
    return engine


def encode_with(engine: Any, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
    """Encode each text with an engine of `load_engine`, in bounded memory, without adding special tokens."""
    arrays: list[NDArray[np.integer[Any]]] = []
    for piece in _pieces(texts):
        encodings = engine.encode_batch_fast(piece, add_special_tokens=False)
        arrays.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
    return arrays


def without_dropout(content: bytes) -> bytes:
    """Copy a tokenizer.json's content without the dropout of its model; ``content`` itself where it has none.

    Raises ValueError.
    """
    if not _DROPOUT.search(content):
        return content
    tokenizer = json.loads(content)
    if not tokenizer["model"].get("dropout"):
        return content  # the word stands in the vocabulary
    tokenizer["model"]["dropout"] = None
    return json.dumps(tokenizer).encode()


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts into runs of about _PIECE_TEXT_BYTES characters; a longer text is a run of its own."""
    piece: list[str] = []
    size = 0
    for text in texts:
        if piece and size + len(text) > _PIECE_TEXT_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(text)
        size += len(text)
    if piece:
        yield piece

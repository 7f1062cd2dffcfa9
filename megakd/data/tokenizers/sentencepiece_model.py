"""Tokenizers of a sentencepiece ``.model``, by the package `sentencepiece`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.tokenizers.base import Tokenizer, TokenizerType
from megakd.errors import UsageError


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model``. A control token written out in a text is text, as in sentencepiece itself."""

    type: TokenizerType = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        model_bytes = path.read_bytes()
        super().__init__(model_bytes)
        self._model_bytes = model_bytes
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UsageError(f"{path}: not a sentencepiece model: {error}") from error
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = None if self._processor.eos_id() < 0 else int(self._processor.eos_id())
        if self.eod is not None:
            self.eod_token, self.eod_reason = self._processor.id_to_piece(self.eod), "eos_id of the model"
        self.bos = None if self._processor.bos_id() < 0 else int(self._processor.bos_id())
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if not self._is_text(i)]
        added = [self._processor.id_to_piece(i) for i in _user_defined(model_bytes)]
        self.literals = tuple(filter(None, pieces + added))
        self.white_literals = frozenset(piece for piece in added if piece.replace("\u2581", " ").isspace())

    def token_id(self, token: str) -> int | None:
        i = int(self._processor.piece_to_id(token))
        return i if self._processor.id_to_piece(i) == token else None

    def _token_of(self, i: int) -> str:
        return str(self._processor.id_to_piece(i))

    def _identity(self) -> bytes:
        return self._model_bytes

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        # One thread: the documents are spread over processes.
        return [np.asarray(ids, dtype=np.int32) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def token_bytes(self) -> NDArray[np.int32]:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for i in range(self.vocab_size):
            if self._processor.is_byte(i):
                sizes[i] = 1
            elif self._is_text(i):
                sizes[i] = len(self._processor.id_to_piece(i).replace("▁", " ").encode())
        return sizes

    def _is_text(self, i: int) -> bool:
        return not (self._processor.is_control(i) or self._processor.is_unknown(i) or self._processor.is_unused(i))


def _user_defined(model: bytes) -> list[int]:
    """Ids of the user-defined pieces of a ``.model``, which are taken whole wherever they stand.

    The file is a protocol buffer: field 1 of the model is a piece, field 3 of a piece its type; 4 is user-defined.
    """
    pieces = [value for field, value in _fields(model) if field == 1 and isinstance(value, bytes)]
    return [i for i, piece in enumerate(pieces) if (3, 4) in _fields(piece)]


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """Number and value, an integer or bytes, of each field of a protocol buffer that sentencepiece has read before."""
    fields: list[tuple[int, int | bytes]] = []
    place = 0

    def read_integer() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = read_integer()
        if key & 7 == 0:
            fields.append((key >> 3, read_integer()))
            continue
        size = {1: 8, 5: 4}.get(key & 7) or read_integer()
        fields.append((key >> 3, message[place : place + size]))
        place += size
    return fields

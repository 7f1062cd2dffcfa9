"""Tokenizers under Megatron's names, by their reference engines; `engines` makes the same ids faster.

No remote files, no remote code: a model is a local file, or a local folder with one in it.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from megakd.errors import UsageError

TokenizerType = Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"]

_PIECE_TEXT_BYTES = 128 * 1024  # text given to one call of `tokenizers`, which holds some 200 bytes a byte of it
_END_OF_TEXT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


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
    literals: tuple[str, ...] = ()
    """Texts of control and special tokens: what engines disagree about when it is written out in a document."""

    def __init__(self, content: bytes) -> None:
        self.hash = xxhash.xxh3_128_hexdigest(self.type.encode() + b"\0" + content)
        """XXH3-128 of the type and the model's bytes."""

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

    def describe(self) -> dict[str, Any]:
        """What a manifest records; ``path`` is a hint for people."""
        return {
            "type": self.type,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "path": None if self.path is None else str(self.path),
        }


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | Path | None,
    *,
    vocab_size: int | None = None,
    model_flag: str = "--tokenizer-model",
    type_flag: str | None = "--tokenizer-type",
) -> Tokenizer:
    """A tokenizer by Megatron's name.

    tokenizer_model: the ``.model`` file, or a ``tokenizer.json`` or the folder that holds it; None where there is none.
    vocab_size: for ``NullTokenizer``, the number of ids without the end-of-document id that follows them.
    model_flag, type_flag: for messages, the flags that gave model and type; None for a type that no flag gave.

    Raises UsageError.
    """
    if tokenizer_type not in _TYPES:
        raise UsageError(f"{type_flag} {tokenizer_type}: expected one of {', '.join(_TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise UsageError("--vocab-size is missing; NullTokenizer has no model that tells it")
        return NullTokenizer(vocab_size)
    tokenizer: Tokenizer
    try:
        file = model_file(tokenizer_type, tokenizer_model)
        if file is None:
            tokenizer = ByteTokenizer()
        elif tokenizer_type == "SentencePieceTokenizer":
            tokenizer = SentencePieceTokenizer(file)
        else:
            tokenizer = HuggingFaceTokenizer(file)
    except UsageError as error:
        other = None if tokenizer_model is None else _type_of(Path(tokenizer_model))
        hint = f"; it is a {other}'s" if other not in (None, tokenizer_type) else ""
        hint += f": {type_flag} {other}" if hint and type_flag else ""
        raise UsageError(f"{model_flag} {error}{hint}") from error
    if vocab_size not in (None, tokenizer.vocab_size):
        raise UsageError(f"--vocab-size {vocab_size}: the model has {tokenizer.vocab_size} entries; leave the flag out")
    return tokenizer


def model_file(tokenizer_type: TokenizerType, tokenizer_model: str | Path | None) -> Path | None:
    """The one file that defines the ids; None for a type that has no model.

    Raises UsageError where there is none; as in the constructors below, the message goes on behind the flag's name.
    """
    if tokenizer_type in ("NullTokenizer", "ByteTokenizer"):
        return None
    if tokenizer_model is None:
        raise UsageError(f"is missing; {tokenizer_type} needs a local file or folder")
    path = Path(tokenizer_model)
    if not path.exists():
        raise UsageError(f"{path}: no such file; models are local, nothing is downloaded")
    if path.is_dir() and tokenizer_type == "SentencePieceTokenizer":
        raise UsageError(f"{path}: a folder; SentencePieceTokenizer needs the .model file")
    if path.is_dir():
        path /= "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{path}: no such file; save a fast tokenizer in that folder")
    return path


def same_tokenizer(one: Mapping[str, Any] | Tokenizer, other: Mapping[str, Any] | Tokenizer) -> bool:
    """Whether two tokenizers, or their records in manifests, give every text the same ids: same type, same model."""
    first, second = (each.describe() if isinstance(each, Tokenizer) else each for each in (one, other))
    return all(first[key] == second[key] for key in ("type", "hash", "vocab_size", "eod"))


def name_tokenizer(tokenizer: Mapping[str, Any] | Tokenizer) -> str:
    """Which it is, for messages."""
    record = tokenizer.describe() if isinstance(tokenizer, Tokenizer) else tokenizer
    return f"{record.get('type')} {record.get('hash')} (vocabulary {record.get('vocab_size')})"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model``. A control token written out in a text is text, as sentencepiece has it."""

    type: TokenizerType = "SentencePieceTokenizer"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        model_bytes = path.read_bytes()
        super().__init__(model_bytes)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise UsageError(f"{path}: not a sentencepiece model: {error}") from error
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = None if self._processor.eos_id() < 0 else int(self._processor.eos_id())
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if not self._is_text(i)]
        self.literals = tuple(filter(None, pieces))

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


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` through the package `tokenizers`. A special token written out in a text is that token.

    The end of a document is ``eos_token`` of the tokenizer_config.json beside it.
    """

    type: TokenizerType = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # documents are spread over processes
        from tokenizers import Tokenizer as Engine

        self.path = path
        model_bytes = path.read_bytes()
        try:
            self._engine = Engine.from_str(model_bytes.decode())
        except Exception as error:
            if type(error) is not Exception and not isinstance(error, ValueError):
                raise  # the package raises bare Exception for what it cannot read; anything else is a fault
            raise UsageError(f"{path}: not a tokenizer.json: {error}") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        added = self._engine.get_added_tokens_decoder()
        self._special_ids = {i for i, token in added.items() if token.special}
        self.literals = tuple(token.content for token in added.values() if token.content)
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values(), default=-1)
        end_of_text = _read_eos_token(path.parent) or self._guess_eos_token()
        self.eod = None if end_of_text is None else self._engine.token_to_id(end_of_text)
        if end_of_text is not None and self.eod is None:
            raise UsageError(f"{path.parent}: eos_token {end_of_text!r} is not in the vocabulary of {path.name}")
        super().__init__(model_bytes + b"\0" + str(self.eod).encode())

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        arrays: list[NDArray[np.integer[Any]]] = []
        for piece in _pieces(texts):
            encodings = self._engine.encode_batch_fast(piece, add_special_tokens=False)
            arrays.extend(np.array(encoding.ids, dtype=np.int32) for encoding in encodings)
        return arrays

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._engine.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def token_bytes(self) -> NDArray[np.int32]:
        byte_level = "ByteLevel" in json.dumps(json.loads(self._engine.to_str()).get("decoder"))
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

    def _guess_eos_token(self) -> str | None:
        """The one special token of a well-known name; None if there is none, or a choice that is not ours to make."""
        known = [name for name in _END_OF_TEXT_NAMES if self._engine.token_to_id(name) in self._special_ids]
        return known[0] if len(known) == 1 else None


class NullTokenizer(Tokenizer):
    """Text that is ids already, in decimal, separated by white space. The id after the last one ends a document."""

    type: TokenizerType = "NullTokenizer"
    path = None

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise UsageError(f"--vocab-size {vocab_size}: expected at least 1")
        self.vocab_size = vocab_size + 1
        self.eod = vocab_size
        super().__init__(str(vocab_size).encode())

    def encode(self, text: str) -> list[int]:
        words = text.split()
        bad = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) < 11)), None)
        if bad is not None:
            raise UnencodableError(f"{bad[:40]!r} is no token id")
        ids = [int(word) for word in words]
        if ids and max(ids) >= self.vocab_size:
            raise UnencodableError(f"token id {max(ids)}: the vocabulary has {self.vocab_size} entries")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids if i != self.eod)

    def token_bytes(self) -> NDArray[np.int32]:
        sizes = np.array([len(str(i)) + 1 for i in range(self.vocab_size)], dtype=np.int32)  # with its separator
        sizes[self.eod or 0] = 0
        return sizes


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and id 256 for the end of a document. Needs no model."""

    type: TokenizerType = "ByteTokenizer"
    path = None
    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        super().__init__(b"")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.integer[Any]]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([1] * 256 + [0], dtype=np.int32)


_TYPES: tuple[TokenizerType, ...] = (
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
)


def _type_of(path: Path) -> TokenizerType | None:
    """Whose model a file or folder looks like; None where it looks like nobody's."""
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        if "tokenizer.json" in names:
            return "HuggingFaceTokenizer"
        return "SentencePieceTokenizer" if any(name.endswith(".model") for name in names) else None
    if not path.is_file():
        return None
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.lstrip()[:1] == b"{":
        return "HuggingFaceTokenizer"
    # a protocol buffer whose first field, the pieces, is a message that starts with the piece's text
    return "SentencePieceTokenizer" if head[:1] == head[2:3] == b"\n" else None


def _read_eos_token(folder: Path) -> str | None:
    """``eos_token`` of the files that transformers writes beside a tokenizer.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                value = json.loads((folder / name).read_bytes()).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise UsageError(f"{folder / name}: not a JSON object: {error}") from error
            content = value.get("content") if isinstance(value, dict) else value
            if content is not None:
                return str(content)
    return None


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """Runs of texts of about _PIECE_TEXT_BYTES characters; a longer text is a run of its own."""
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

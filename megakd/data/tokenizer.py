"""Tokenizers under Megatron's names, by their reference engines; `tokenizers.fast` makes the same ids faster.

A model is a local file, or a local folder that holds it: nothing is downloaded, and no code of a model runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.data.tokenizers.base import (
    Ragged,
    Tokenizer,
    TokenizerType,
    UnencodableError,
    name_tokenizer,
    same_tokenizer,
)
from megakd.data.tokenizers.huggingface import HuggingFaceTokenizer
from megakd.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from megakd.errors import UsageError

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "Ragged",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TokenizerType",
    "UnencodableError",
    "build_tokenizer",
    "model_file",
    "name_tokenizer",
    "same_tokenizer",
]


def build_tokenizer(
    tokenizer_type: TokenizerType,
    tokenizer_model: str | Path | None,
    *,
    vocab_size: int | None = None,
    eod_token: str | None = None,
    model_flag: str = "--tokenizer-model",
    type_flag: str | None = "--tokenizer-type",
) -> Tokenizer:
    """Build a tokenizer by Megatron's name.

    tokenizer_model: a ``.model`` file, a ``tokenizer.json`` or the folder that holds it; None for a type without one.
    vocab_size: number of ids of a ``NullTokenizer``, without the end-of-document id that follows them.
    eod_token: text of the end-of-document token; None for the one that the model's own files name.
    model_flag, type_flag: flags that gave model and type, for messages; None for a type that no flag gave.

    Raises UsageError for a type, a model or a token that cannot be used.
    """
    if tokenizer_type not in _TYPES:
        raise UsageError(f"{type_flag} {tokenizer_type}: expected one of {', '.join(_TYPES)}")
    if tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise UsageError("--vocab-size is missing; NullTokenizer has no model that tells it")
        return _ending_with(NullTokenizer(vocab_size), eod_token)
    foreign = None if tokenizer_model is None else _name_foreign(Path(tokenizer_model))
    if foreign is not None:
        raise UsageError(f"{model_flag} {tokenizer_model}: {foreign}")
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
        fitting = None if tokenizer_model is None else _type_of(Path(tokenizer_model))
        hint = f"; it is a {fitting}'s" if fitting not in (None, tokenizer_type) else ""
        hint += f": {type_flag} {fitting}" if hint and type_flag else ""
        raise UsageError(f"{model_flag} {error}{hint}") from error
    if vocab_size not in (None, tokenizer.vocab_size):
        raise UsageError(f"--vocab-size {vocab_size}: the model has {tokenizer.vocab_size} entries; leave the flag out")
    return _ending_with(tokenizer, eod_token)


def model_file(tokenizer_type: TokenizerType, tokenizer_model: str | Path | None) -> Path | None:
    """Find the one file that defines the ids; None for a type that has no model.

    Raises UsageError where the file is missing; its message continues the name of a flag, which the caller puts first.
    """
    if tokenizer_type in ("NullTokenizer", "ByteTokenizer"):
        return None
    if tokenizer_model is None:
        raise UsageError(f"is missing; {tokenizer_type} needs a local file or folder")
    path = Path(tokenizer_model)
    if not path.exists():
        raise UsageError(f"{path}: no such file; models are local, nothing is downloaded")
    if path.is_dir() and tokenizer_type == "SentencePieceTokenizer":
        models = sorted(path.glob("*.model"))
        if len(models) != 1:
            names = ", ".join(model.name for model in models) or "none"
            raise UsageError(f"{path}: a folder; SentencePieceTokenizer needs the .model file, of which it has {names}")
        return models[0]
    if path.is_dir():
        path /= "tokenizer.json"
        if not path.is_file():
            raise UsageError(f"{path}: no such file; save a fast tokenizer in that folder")
    return path


class NullTokenizer(Tokenizer):
    """Tokenizer of texts that are decimal ids, separated by white space. The id after the last one ends a document."""

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
    """Tokenizer of UTF-8 bytes, with id 256 for the end of a document. Needs no model."""

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


_TEKKEN = re.compile(rb'"(token_bytes|default_num_special_tokens)"\s*:')
_TIKTOKEN = re.compile(rb"([A-Za-z0-9+/]+={0,2} [0-9]+\r?\n)+")
_TYPES: tuple[TokenizerType, ...] = (
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "NullTokenizer",
    "ByteTokenizer",
)


def _ending_with(tokenizer: Tokenizer, eod_token: str | None) -> Tokenizer:
    if eod_token is not None:
        tokenizer.end_documents_with(eod_token)
    return tokenizer


def _name_foreign(path: Path) -> str | None:
    """Name a model of a kind that cannot be read, with a way out; None for any other file or folder."""
    if path.is_dir():
        usable = (path / "tokenizer.json").exists() or any(path.glob("*.model"))
        files = [] if usable else sorted((*path.glob("tekken*.json"), *path.glob("*.tiktoken")))
    else:
        files = [path] if path.is_file() else []
    for file in files:
        with open(file, "rb") as stream:
            head = stream.read(1 << 16)
        if _TEKKEN.search(head):
            return (
                f"{file.name} is a tekken file, a format of Mistral's own that neither engine reads; the folder of the "
                "same model for transformers has a tokenizer.json with the same ids: --tokenizer-type "
                "HuggingFaceTokenizer --tokenizer-model that folder"
            )
        if _TIKTOKEN.match(head):
            return (
                f"{file.name} is a list of tiktoken's ranks, without the rule by which text is cut and without the "
                "special tokens: its ids would be guesses; take the tokenizer.json of the same model, or make one with "
                "transformers.convert_slow_tokenizer.TikTokenConverter(vocab_file=..., pattern=..., "
                "additional_special_tokens=[...]).converted().save('tokenizer.json')"
            )
    return None


def _type_of(path: Path) -> TokenizerType | None:
    """Tokenizer type whose model a file or folder looks like; None for no type."""
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
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

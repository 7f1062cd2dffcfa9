"""End-of-document token of a ``tokenizer.json``, from the files that transformers writes beside it.

A tokenizer.json does not name that token. The files beside it name the token that ends a *generation*, which for a
model that was trained to chat is the end of a message: right for a server, and wrong for a corpus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.errors import UsageError

DOCUMENT_ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "<eod>",
    "<|endofdocument|>",
)
"""End-of-document tokens of well-known vocabularies."""
_CHAT_END = re.compile(
    r"<\|?(im_end|eot|eot_id|eom_id|eom|end_of_turn|end_of_role|end_of_message|end|return|call|turn|user|assistant"
    r"|end_turn|message_end)\|?>|<\|END_OF_TURN_TOKEN\|>|\[/INST\]|<\|im_sep\|>|<\uff5cend\u2581of\u2581turn\uff5c>",
    re.IGNORECASE,
)
_GUESSED = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


@dataclass(frozen=True)
class EndOfDocument:
    """End-of-document token, with its origin and reasons to doubt it, for people."""

    token: str
    reason: str
    warnings: tuple[str, ...] = ()


def find_end_of_document(
    folder: Path, *, token_of: Callable[[int], str | None], special: Collection[str], vocabulary: Collection[str]
) -> EndOfDocument | None:
    """Find the token that the files beside a tokenizer.json name, else the only special token of a well-known name.

    None where there is neither. token_of: the text of an id. special: special tokens. vocabulary: all tokens.

    Raises UsageError for files that cannot be read.
    """
    named = {name: token for name, read in _NAMING.items() if (token := read(folder / name)) is not None}
    if named:
        source, token = next(iter(named.items()))
        reason = f"eos_token of {source}"
    else:
        known = [name for name in _GUESSED if name in special]
        if len(known) != 1:
            return None
        token, reason = known[0], "the only special token of a well-known name"
    warnings = []
    contradictions = [f"{name} says {named_token}" for name, named_token in named.items() if named_token != token]
    generation = {token_of(i) for i in _read_eos_token_ids(folder / "generation_config.json")}
    if generation and token not in generation:
        contradictions.append(f"generation_config.json says {', '.join(sorted(map(str, generation)))}")
    if contradictions:
        listed = ", ".join(contradictions)
        warnings.append(f"the end of a document is {token} ({reason}), but {listed}: --eod-token decides")
    better = [name for name in DOCUMENT_ENDS if name in vocabulary and name != token]
    if _CHAT_END.fullmatch(token) and better:
        warnings.append(
            f"{token} ends a message of a chat, not a document; the vocabulary has {', '.join(better)}: "
            f"--eod-token '{better[0]}' takes it"
        )
    return EndOfDocument(token, reason, tuple(warnings))


def generation_ends(folder: Path) -> list[int]:
    """Ids at which a model's own files end what it writes: of generation_config.json, else of config.json.

    Raises UsageError for files that cannot be read.
    """
    named = (_read_eos_token_ids(folder / name) for name in ("generation_config.json", "config.json"))
    return next(filter(None, named), [])


def find_begin_of_text(folder: Path) -> str | None:
    """Find the token that begins a text, by the files beside a tokenizer.json; None where they name none.

    Raises UsageError for files that cannot be read.
    """
    tokens = (_read_token(folder / name, "bos_token") for name in _NAMING)
    return next((token for token in tokens if token is not None), None)


def _read_eos_token(path: Path) -> str | None:
    return _read_token(path, "eos_token")


def _read_token(path: Path, name: str) -> str | None:
    value = _read_object(path).get(name)
    content = value.get("content") if isinstance(value, dict) else value
    return None if content is None else str(content)


def _read_eos_token_ids(path: Path) -> list[int]:
    value = _read_object(path).get("eos_token_id")
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content


_NAMING: dict[str, Callable[[Path], str | None]] = {
    "tokenizer_config.json": _read_eos_token,
    "special_tokens_map.json": _read_eos_token,
}

"""Tokenizer files of a folder that is exported: copied byte for byte from where the tokenizer lies. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megakd.data.tokenizer import build_tokenizer, model_file, name_tokenizer, same_tokenizer
from megakd.data.tokenizers.base import Tokenizer, TokenizerType
from megakd.data.tokenizers.recorded import end_as_recorded
from megakd.errors import MismatchError, UsageError

TOKENIZER_CONFIG = "tokenizer_config.json"
_BESIDE = (
    TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.json",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# kind -> the name that transformers looks for, and the class that reads it without adding ids of its own
_NAMES: Mapping[str, str] = {"HuggingFaceTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}
_CLASSES: Mapping[str, dict[str, Any]] = {
    "HuggingFaceTokenizer": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "SentencePieceTokenizer": {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": True,  # or a text that begins with a space would have other ids
    },
}

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of a tokenizer, by their names in an exported folder: ``copied`` from a path, ``written`` from bytes.

    record: of the tokenizer, as manifests have it; None if it is not known. note: for people, if there are no files.
    """

    record: Mapping[str, Any] | None
    copied: Mapping[str, Path] = field(default_factory=dict)
    written: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""


def find_tokenizer_files(
    recorded: Mapping[str, Any] | None,
    *,
    tokenizer_type: TokenizerType | None,
    tokenizer_model: str | None,
    max_length: int,
    what: str,
    or_else: str = "",
) -> TokenizerFiles:
    """Return the files of the tokenizer that is recorded, or given by flags, after its hash was compared.

    recorded: of the checkpoint's manifest; None if it has none. tokenizer_type, tokenizer_model: by flags. max_length:
    longest sequence of the model, in tokens. what, or_else: for messages, the name of the checkpoint, and another way
    out where files are missing.

    Files that lie beside a ``tokenizer.json`` under the names of transformers belong to it. Where no
    ``tokenizer_config.json`` does, one is written that adds no id to a text.

    Raises:
        UsageError: the files are not there. MismatchError: the tokenizer is another one than the recorded.
    """
    kind: Any = tokenizer_type or (recorded or {}).get("type")
    if kind is None and tokenizer_model is None:
        return TokenizerFiles(None, note="no tokenizer is recorded, and none is given by --tokenizer-model")
    if kind is None:
        raise UsageError(f"--tokenizer-model {tokenizer_model}: {what} does not record its type: add --tokenizer-type")
    if kind not in _NAMES:
        return TokenizerFiles(recorded, note=f"{kind} is a tokenizer that transformers does not have")
    model = tokenizer_model or (recorded or {}).get("path")
    try:
        tokenizer = build_tokenizer(kind, model, type_flag="--tokenizer-type" if tokenizer_type else None)
        file = model_file(kind, model)
    except UsageError as error:
        raise UsageError(
            f"{what}: opening its tokenizer, whose files an export holds: {error}; --tokenizer-model says where it is "
            f"now{or_else}"
        ) from error
    if recorded is not None:
        end_as_recorded(tokenizer, recorded)
        if not same_tokenizer(recorded, tokenizer):
            raise MismatchError(
                f"{what}: trained with the tokenizer {name_tokenizer(recorded)}; the one in {file} is "
                f"{name_tokenizer(tokenizer)}"
            )
    assert file is not None
    copied = {_NAMES[kind]: file}
    if file.name == _NAMES[kind]:
        copied |= {name: file.parent / name for name in _BESIDE if (file.parent / name).is_file()}
    written = {} if TOKENIZER_CONFIG in copied else {TOKENIZER_CONFIG: _config(kind, tokenizer, max_length)}
    return TokenizerFiles(recorded or tokenizer.describe(), copied, written)


def doubt_of_tokenizer(files: TokenizerFiles, model_type: str) -> str | None:
    """Return a warning if transformers would not read the files as they are; None if it would.

    AutoTokenizer of transformers 5 takes the class Qwen2Tokenizer for every model of type qwen2, whatever class
    ``tokenizer_config.json`` names, and that class cuts text by its own pattern, not by that of ``tokenizer.json``.
    """
    file = files.copied.get("tokenizer.json")
    if file is None and "tokenizer.model" in files.copied:
        return (
            "transformers 5 converts a sentencepiece model to a form of its own, in which texts that begin with "
            "spaces, and all texts of a unigram model, may have other ids; transformers 4 reads it as it is. Compare "
            "the ids of a few texts, or lay the tokenizer.json of the same model beside it"
        )
    if file is None or model_type != "qwen2":
        return None
    content = json.loads(file.read_bytes())
    cuts, normalizer = json.dumps(content.get("pre_tokenizer")), content.get("normalizer") or {}
    if json.dumps(_QWEN2_PATTERN) in cuts and normalizer.get("type") == "NFC":
        return None
    return (
        "AutoTokenizer of transformers 5 makes other ids of a text with this folder: it takes Qwen 2's own tokenizer "
        "for every model_type qwen2, and this one is another. Load it with "
        "transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)"
    )


def _config(kind: str, tokenizer: Tokenizer, max_length: int) -> bytes:
    """Return the content of a ``tokenizer_config.json``."""
    content = {
        **_CLASSES[kind],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # the models here take no types of tokens
    }
    if tokenizer.eod_token is not None:
        content["eos_token"] = tokenizer.eod_token
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"

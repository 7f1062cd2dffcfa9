"""Flags of ``megakd preprocess``, apart from the work so that ``--help`` imports none of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError
from megakd.work.bad_budget import BadBudgetFlags


@dataclass(frozen=True)
class PreprocessConfig(BadBudgetFlags):
    """Flags of ``megakd preprocess``."""

    input: list[str] = option(..., "JSON lines files: plain, .gz or .zst; globs in quotes are expanded in sorted order")
    output_prefix: str = option(
        ..., "prefix of the outputs: PREFIX_KEY_document.bin, .idx, .bytes and .manifest.json for each key"
    )
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "NullTokenizer", "ByteTokenizer"] = (
        option(..., "Megatron's name of the tokenizer")
    )
    tokenizer_model: str | None = option(None, "local .model file, tokenizer.json, or folder with either", common=True)
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer, its end of document not counted")
    json_keys: list[str] = option(["text"], "keys whose texts become documents, one dataset each", common=True)
    append_eod: bool = option(False, "end each document with the end-of-document id", common=True)
    eod_token: str | None = option(
        None, "end-of-document token as text (default: the one that the model's files name)", common=True
    )
    workers: int = option(0, "worker processes; 0: one for each core", common=True)
    log_interval: int = option(10000, "documents between progress lines, where stderr is no terminal", common=True)
    max_bad_fraction: float = option(
        0.001, "fraction of records that may be bad; with more, exit status 3", common=True
    )
    strict: bool = option(False, "allow no bad record at all", common=True)
    max_doc_bytes: int = option(4 << 20, "bytes of the longest line; a longer one is a bad record", common=True)
    tokenizer_engine: Literal["auto", "reference", "gigatoken"] = option(
        "auto", "engine that encodes; auto: the fast one where it gives the reference engine's ids", common=True
    )
    shard_bytes: int = option(
        0, "bytes of text per shard, which a killed run repeats; 0: 16 MiB, or a 4096th of the input"
    )
    work_dir: str | None = option(None, "folder for unfinished work (default: PREFIX.work)")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        for name in ("max_doc_bytes", "log_interval"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if min(self.workers, self.shard_bytes) < 0:
            raise UsageError(f"--workers {self.workers}, --shard-bytes {self.shard_bytes}: expected 0 or more")
        self.check_fraction()
        if len(set(self.json_keys)) != len(self.json_keys) or any("/" in key for key in self.json_keys):
            raise UsageError(f"--json-keys {' '.join(self.json_keys)}: expected different names, fit for file names")
        if not os.path.basename(self.output_prefix):
            raise UsageError(f"--output-prefix {self.output_prefix} is a folder; add the beginning of a file name")

"""Flags of ``megakd retokenize``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.data.tokenizer import TokenizerType
from megakd.data.tokenizers.fast import EngineMode
from megakd.errors import UsageError
from megakd.work.bad_budget import BadBudgetFlags


@dataclass(frozen=True)
class RetokenizeConfig(BadBudgetFlags):
    """Flags of ``megakd retokenize``."""

    input_prefix: str = option(..., "dataset to read, without .bin or .idx")
    output_prefix: str = option(..., "dataset to write, without .bin or .idx")
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"] = option(
        ..., "Megatron's name of the new tokenizer"
    )
    tokenizer_model: str | None = option(None, "local .model file, tokenizer.json, or folder with either", common=True)
    source_tokenizer_type: TokenizerType | None = option(
        None, "type of the old tokenizer (default: as recorded)", common=True
    )
    source_tokenizer_model: str | None = option(
        None, "file or folder of the old tokenizer (default: as recorded)", common=True
    )
    source_vocab_size: int | None = option(
        None, "number of ids of an old NullTokenizer, its end of document not counted"
    )
    append_eod: bool = option(
        True, "end each document with the end-of-document id, unless it does already", common=True
    )
    eod_token: str | None = option(
        None, "new end-of-document token as text (default: the one that the model's files name)", common=True
    )
    workers: int = option(0, "worker processes; 0: one for each core", common=True)
    log_interval: int = option(10000, "documents between progress lines, where stderr is no terminal", common=True)
    max_bad_fraction: float = option(
        0.001, "fraction of documents whose text may be lost in part; with more, exit status 3", common=True
    )
    strict: bool = option(False, "allow no document that loses text", common=True)
    tokenizer_engine: EngineMode = option(
        "auto", "engine that encodes; auto: the fast one where it gives the reference engine's ids", common=True
    )
    shard_tokens: int = option(0, "tokens per shard, which a killed run repeats; 0: 4 Mi, or a 4096th of the dataset")
    work_dir: str | None = option(None, "folder for unfinished work (default: PREFIX.work)")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if min(self.workers, self.shard_tokens) < 0 or self.log_interval < 1:
            raise UsageError(
                f"--workers {self.workers}, --shard-tokens {self.shard_tokens}: expected 0 or more; "
                f"--log-interval {self.log_interval}: expected at least 1"
            )
        self.check_fraction()
        if not os.path.basename(self.output_prefix):
            raise UsageError(f"--output-prefix '{self.output_prefix}': expected FOLDER/NAME")
        if not os.path.isdir(os.path.dirname(self.output_prefix) or "."):
            raise UsageError(f"--output-prefix {self.output_prefix}: its folder does not exist")
        if os.path.realpath(self.output_prefix) == os.path.realpath(self.input_prefix):
            raise UsageError(f"--output-prefix {self.output_prefix}: the output is the input")

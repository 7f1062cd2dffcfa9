"""Flags of ``megakd convert``. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.config.tree import option
from megakd.data.tokenizers.base import TokenizerType
from megakd.errors import UsageError
from megakd.model.huggingface.export_plan import ExportDtype


@dataclass(frozen=True)
class ConvertConfig:
    """Flags of ``megakd convert``."""

    load: str = option(..., "Hugging Face folder to read, or checkpoint, or the folder of a run's checkpoints")
    save: str = option(..., "folder to write the model to")
    saver: Literal["checkpoint", "huggingface"] | None = option(
        None, "form to write: a checkpoint of megakd's, or a Hugging Face folder (default: the one that --load is not)",
        common=True,
    )  # fmt: skip
    bf16: bool | None = option(
        None,
        "write bfloat16 weights to a checkpoint (default: as they are; float16 becomes float32)",
        common=True,
    )
    make_vocab_size_divisible_by: int = option(
        128, "divisor of the rows of the embedding that is written to a checkpoint"
    )
    ckpt_step: int | None = option(None, "step of the checkpoint to export (default: the latest)", common=True)
    dtype: ExportDtype | None = option(
        None,
        "type of the weights in a Hugging Face folder (default: as the checkpoint has them; float16 if they came so)",
        common=True,
    )
    max_shard_size: str = option(
        "5GB", "most bytes of tensors in one file of a Hugging Face folder, as in 500MB, 5GB or 4GiB", common=True
    )
    tokenizer_model: str | None = option(
        None, "file or folder of the tokenizer, for an export (default: where the checkpoint records it)", common=True
    )
    tokenizer_type: TokenizerType | None = option(
        None, "type of the tokenizer, for the export of a checkpoint that records none"
    )
    no_tokenizer_files: bool = option(False, "leave the files of the tokenizer out of a Hugging Face folder")
    vocab_size: int | None = option(
        None, "true vocabulary, for the export of a checkpoint that does not tell which of its rows are padding"
    )
    max_position_embeddings: int | None = option(
        None, "longest sequence that the folder tells, in tokens (default: as the model was imported, else trained)"
    )
    model_config: str | None = option(
        None, "YAML that describes the model as a run's student, for a checkpoint that does not"
    )

    @property
    def max_shard_bytes(self) -> int:
        """Most bytes of tensors in one file. Raises UsageError for a text that is no size."""
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?B?|B)?", self.max_shard_size.strip(), re.IGNORECASE)
        size = 0.0
        if match is not None:
            unit = (match[2] or "B").upper().removesuffix("B")
            base = 1024 if unit.endswith("I") else 1000
            size = float(match[1]) * float(base ** " KMGT".index(unit[:1] or " "))
        if size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size}: expected bytes, as in 500MB, 5GB or 4GiB")
        return int(size)

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if not 1 <= self.make_vocab_size_divisible_by <= 1 << 24:
            raise UsageError(
                f"--make-vocab-size-divisible-by is {self.make_vocab_size_divisible_by}; expected 1 to {1 << 24}"
            )
        _ = self.max_shard_bytes  # refuses a text that is no size
        for name, least in (("ckpt_step", 0), ("vocab_size", 1), ("max_position_embeddings", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
        if Path(self.load).resolve() == Path(self.save).resolve():
            raise UsageError(f"--save {self.save} is the folder of --load; give another")

    def of_exports(self) -> list[str]:
        """Return the flags that were given and are for exports alone."""
        flags = (
            *("ckpt_step", "dtype", "tokenizer_model", "tokenizer_type"),
            *("vocab_size", "max_position_embeddings", "model_config"),
        )
        return [f"--{name.replace('_', '-')}" for name in flags if getattr(self, name) is not None]

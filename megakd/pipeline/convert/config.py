"""Flags of ``megakd convert``. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.config.tree import option
from megakd.errors import UsageError


@dataclass(frozen=True)
class ConvertConfig:
    """Flags of ``megakd convert``."""

    load: str = option(..., "Hugging Face folder to read")
    save: str = option(..., "folder to write the model to")
    saver: Literal["checkpoint"] = option("checkpoint", "form to write: a checkpoint of megakd's", common=True)
    bf16: bool | None = option(
        None, "write bfloat16 weights (default: as they are; float16 becomes float32)", common=True
    )
    make_vocab_size_divisible_by: int = option(128, "divisor of the rows of the embedding that is written")

    def validate(self) -> None:
        """Raise UsageError for values that cannot work."""
        if not 1 <= self.make_vocab_size_divisible_by <= 1 << 24:
            raise UsageError(
                f"--make-vocab-size-divisible-by is {self.make_vocab_size_divisible_by}; expected 1 to {1 << 24}"
            )
        if Path(self.load).resolve() == Path(self.save).resolve():
            raise UsageError(f"--save {self.save} is the folder of --load; give another")

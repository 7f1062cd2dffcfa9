"""The flags of ``megakd report``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.tree import option
from megakd.data.tokenizer import TokenizerType
from megakd.errors import UsageError


@dataclass(frozen=True)
class ReportConfig:
    """The scores to look at, the selection made from them, and a second scoring to compare with."""

    output: str = option(..., "folder for report.html, the tables (.csv) and the plots (.png)")
    teacher_scores: str = option(..., "the teacher's scores of the dataset", common=True)
    reference_scores: str = option(..., "the reference model's scores of the dataset", common=True)
    selection: str | None = option(
        None, "selection to show (default: the --ratio with the largest scores)", common=True
    )
    other_teacher_scores: str | None = option(
        None, "another teacher's scores, to compare keep and drop with (default: the same teacher's)"
    )
    other_reference_scores: str | None = option(
        None, "another reference's scores, to compare keep and drop with, for instance a larger one's", common=True
    )
    ratio: float | None = option(
        None, "share that either scoring keeps (default: the selection's, else 0.5)", common=True
    )
    teacher_scale: float | None = option(
        None, "lambda in score = NLL_reference - lambda * NLL_teacher (default: the selection's, else 1)", common=True
    )
    normalise: Literal["token", "sample", "byte"] | None = option(
        None, "unit that NLLs are per: token, sample or byte (default: the selection's, else token)"
    )
    data_path: str | None = option(
        None, "the dataset's prefix: adds document lengths, decoded extremes and diversity", common=True
    )
    domains: str | None = option(None, "file of lines NAME FIRST STOP, ranges of documents, as select reads it")
    exclude_ids: list[str] = option([], "samples to leave out: selections, or files of ids, as select reads them")
    tokenizer_model: str | None = option(None, "the tokenizer's file (default: as the dataset records)")
    tokenizer_type: TokenizerType | None = option(None, "type of the tokenizer, if the dataset records none")
    vocab_size: int | None = option(None, "number of ids of a NullTokenizer that is not recorded")
    bins: int = option(100, "histogram bins along each axis")
    extremes: int = option(10, "number of samples to show from either end; 0: none")
    extreme_chars: int = option(1200, "characters to show of each of these samples")
    diversity_samples: int = option(2000, "number of samples to count n-grams in; 0: none")
    seed: int | None = option(
        None, "seed of ties, and of the draw of samples to count n-grams in (default: the selection's)"
    )

    def validate(self) -> None:
        """Raise UsageError for values that cannot work, whatever the scores."""
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise UsageError(f"--ratio {self.ratio}: expected more than 0 and at most 1")
        if not 3 <= self.bins <= 1000:
            raise UsageError(f"--bins {self.bins}: expected from 3 to 1000")
        for flag, value, least, most in (
            ("--extremes", self.extremes, 0, 1000),
            ("--extreme-chars", self.extreme_chars, 1, 100_000),
            ("--diversity-samples", self.diversity_samples, 0, 100_000),
        ):
            if not least <= value <= most:
                raise UsageError(f"{flag} {value}: expected from {least} to {most}")
        if (self.domains or self.normalise == "byte") and not self.data_path:
            raise UsageError("--domains and --normalise byte read the dataset: add --data-path PREFIX")

    @property
    def compares(self) -> bool:
        """True if there is a second scoring."""
        return bool(self.other_teacher_scores or self.other_reference_scores)

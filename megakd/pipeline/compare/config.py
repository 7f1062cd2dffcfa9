"""The flags of ``megakd compare``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from megakd.config.tree import option
from megakd.errors import UsageError

HELP = "say what a teacher or a selection changed: held-out loss, speed, tokens and FLOPs of several runs side by side"
DESCRIPTION = (
    "Compare training runs by their records (metrics.jsonl, config.yaml, checkpoints): held-out LM loss, bits per "
    "byte, agreement, calibration, tokens/s, and the tokens and FLOPs that it took to reach a loss. Runs whose "
    "configuration differs in the seed and in paths alone are one group, with mean and standard deviation; "
    "differences to the baseline are taken seed by seed where both have the same seeds."
)
EPILOG = (
    "",
    "RUN is [NAME=]FOLDER[+EVALUATION]:",
    "  FOLDER       the --save folder of a run; it may be in progress",
    "  NAME=        its label; runs with one label are one group",
    "  +EVALUATION  the --save folder of a later 'megakd train --skip-train' of that run, whose held-out figures",
    "               stand in the table in place of the last ones of the run",
    "",
    "FLOPs are counted twice: what the student's own training took, and with the forward passes of its teacher, be",
    "they beside the student, in a capture, or in scoring a corpus with it and a reference. Work done once for many",
    "students is counted whole for each; the training of teachers and references is not counted.",
)


@dataclass(frozen=True)
class CompareConfig:
    """The runs to compare, the baseline, and where the results go."""

    run: list[str] = option(..., "runs: [NAME=]FOLDER[+EVALUATION], see below", positional=True)
    baseline: str | None = option(
        None, "label or folder of the run to hold the others against (default: the first run)", common=True
    )
    target_loss: float | None = option(
        None,
        "held-out loss (bits per byte where tokenizers differ) to count tokens and FLOPs up to (default: the "
        "baseline's last)",
        common=True,
    )
    models: list[str] = option(
        [],
        "checkpoint folders of teachers and references, whose sizes give the FLOPs of capture and scoring; those of "
        "--teacher-load and of the runs themselves are known",
        common=True,
    )
    scores: list[str] = option(
        [], "folders of the scores that selections were made from, to count their FLOPs", common=True
    )
    csv: str | None = option(None, "file to write the table to as CSV", common=True)
    json: bool = option(
        False, "JSON is printed in place of the table: groups, runs with their curves, notes", common=True
    )
    plot: str | None = option(
        None,
        "file to write a plot to: held-out loss against tokens and against FLOPs (.png, .svg, .pdf)",
        common=True,
    )

    def validate(self) -> None:
        """Raise UsageError for a target out of range, and for files that cannot be written."""
        if self.target_loss is not None and not 0 < self.target_loss < math.inf:
            raise UsageError(f"--target-loss {self.target_loss}: expected a positive number")
        for name, value in (("csv", self.csv), ("plot", self.plot)):
            if value is not None and Path(value).is_dir():
                raise UsageError(f"--{name} {value} is a folder; expected the name of a file")
        if self.plot is not None and Path(self.plot).suffix not in (".png", ".svg", ".pdf"):
            raise UsageError(f"--plot {self.plot}: expected a name that ends in .png, .svg or .pdf")

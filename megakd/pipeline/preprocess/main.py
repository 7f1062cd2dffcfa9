"""``megakd preprocess``: JSON lines to Megatron's indexed dataset."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.errors import ExitStatus, StoppedBySignal
from megakd.pipeline.preprocess.config import PreprocessConfig
from megakd.work.console import tell

HELP = "tokenize JSON lines into a Megatron .bin/.idx pair"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status. Raises errors that carry one."""
    config = parse(PreprocessConfig, argv, prog="megakd preprocess", description=HELP)
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy copies here; starting its threads costs more than it does
    from megakd.pipeline.preprocess.run import preprocess  # numpy and the tokenizers: not for --help

    try:
        preprocess(config)
    except StoppedBySignal as stop:
        tell(f"{stop}; finished shards are kept: the same command continues")
        return ExitStatus.STOPPED
    return ExitStatus.COMPLETE

"""``megakd retokenize``: a dataset, document by document, into the ids of another tokenizer; lost text is reported."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.errors import ExitStatus, StoppedBySignal
from megakd.pipeline.retokenize.config import RetokenizeConfig
from megakd.pipeline.retokenize.run import retokenize
from megakd.work.console import tell

HELP = "turn a dataset into another tokenizer's, document by document"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(RetokenizeConfig, argv, prog="megakd retokenize", description=HELP)
    try:
        retokenize(config)
    except StoppedBySignal as stop:
        tell(f"{stop}; finished shards are kept: the same command continues")
        return ExitStatus.STOPPED
    return ExitStatus.COMPLETE

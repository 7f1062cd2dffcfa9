"""Verb ``megakd score``: log-probabilities of every sample of a dataset under a model."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.pipeline.score.preflight import ScoreConfig, check_score

HELP = "log-probabilities of a dataset's samples under a model (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        ScoreConfig,
        argv,
        prog="megakd score",
        description="Score every sample of a dataset under a model: the sum of its tokens' log-probabilities, and the "
        "number of tokens. Work is saved in ranges of samples: jobs with the same flags share it and may be started or "
        "killed at any time; the same command continues, and the result does not depend on how many ranks and jobs "
        "there were. Alone: megakd score ...; on several ranks: "
        "torchrun --nproc-per-node N --no-python megakd score ...",
    )
    ignore_known_warnings()
    plan = check_score(config, world_size())
    from megakd.pipeline.score.run import score  # late: torch and megatron load for seconds, a wrong flag should not

    return int(score(config, plan))

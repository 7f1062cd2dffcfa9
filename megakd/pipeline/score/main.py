"""``megakd score``: a model over every sample of a dataset. `score_plan` refuses, `score_run` does the work."""

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
        description="Score every sample of a dataset: the sum of its tokens' log-probabilities under a model, and how "
        "many tokens that were. Work is committed in ranges of samples: any number of ranks and of jobs with the same "
        "flags, started or killed at any time, continue it, and the result does not depend on how many there were. "
        "Alone: megakd score ...; on several ranks: torchrun --nproc-per-node N --no-python megakd score ...",
    )
    ignore_known_warnings()
    plan = check_score(config, world_size())
    from megakd.pipeline.score.run import score  # late: torch and megatron load for seconds, a wrong flag should not

    return int(score(config, plan))

"""``megakd score``: a model over every sample of a dataset. `score_plan` refuses, `score_run` does the work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from megakd.config import parse
from megakd.pipeline.score_plan import ScoreConfig, check_score

HELP = "log-probabilities of a dataset's samples under a model (under torchrun or alone)"

# What megatron-core's calls make torch and itself say in every run, and no user can change.
KNOWN_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated and will be removed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"When using sequence parallelism it is recommended to set the environment variable",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        ScoreConfig,
        argv,
        prog="megakd score",
        description="Score every sample of a dataset: the sum of its tokens' log-probabilities under a model, and how "
        "many tokens that were. Work is committed in ranges of samples: any number of ranks and of jobs with the same "
        "flags, started or killed at any time, continue it, and the result does not depend on how many there were. "
        "Alone: python -m megakd score ...; on several ranks: torchrun --nproc-per-node N -m megakd score ...",
    )
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    plan = check_score(config, int(os.environ.get("WORLD_SIZE", "1")))
    from megakd.pipeline.score_run import score  # late: torch and megatron load for seconds, a wrong flag should not

    return int(score(config, plan))

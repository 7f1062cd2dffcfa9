"""Runs of ``megakd score`` inside a world of the tests, whole or as a killed one leaves them."""

from __future__ import annotations

import os
from typing import Any

import torch
from pipeline.frozen.frozen_runs import make_some

from megakd.config.tree import from_dict, validate
from megakd.pipeline.score.preflight import ScoreConfig, check_score


def make_config(tree: dict[str, Any]) -> ScoreConfig:
    config = from_dict(ScoreConfig, tree)
    validate(config)
    return config


def run_score(tree: dict[str, Any], threads: int = 1) -> int:
    """A whole run in a world; the exit status."""
    from megakd.pipeline.score.run import score

    torch.set_num_threads(threads)
    config = make_config(tree)
    try:
        return int(score(config, check_score(config, int(os.environ["WORLD_SIZE"]))))
    finally:
        torch.set_num_threads(1)


def run_some(tree: dict[str, Any], count: int) -> int:
    """The first ranges, as a run that was killed leaves them; the number of samples that are in the folder then."""
    from megakd.parallel import init_parallel
    from megakd.pipeline.score.run import build_scorer

    config = make_config(tree)
    plan = check_score(config, 1)
    make_some(plan.parts, build_scorer(config, plan, init_parallel(config.parallel(), seed=0)), count)
    return plan.parts.samples_done()

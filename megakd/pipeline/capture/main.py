"""Verb ``megakd capture``: a teacher's output distributions over a dataset, to a logits store."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.pipeline.capture.preflight import CaptureConfig, check_capture

HELP = "a teacher's output distribution over a dataset, to a logits store (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        CaptureConfig,
        argv,
        prog="megakd capture",
        description="Store a teacher's distribution at every token position of a dataset, for any number of students: "
        "its best ids (top_p_k), how often each id was drawn (samples), or drawn ids with renormalised probabilities "
        "(renormalised_samples), each with the teacher's entropy. 'megakd train --logits-load-dir' reads the store, in "
        "any order and layout. Work is saved in shards: jobs with the same flags share it and may be started or killed "
        "at any time; the same command continues, and the result does not depend on how many ranks and jobs there "
        "were. "
        "Alone: megakd capture ...; on several ranks: torchrun --nproc-per-node N --no-python megakd capture ...",
    )
    ignore_known_warnings()
    plan = check_capture(config, world_size())
    from megakd.pipeline.capture.run import (
        capture,  # late: torch and megatron load for seconds, a wrong flag should not
    )

    return int(capture(config, plan))

"""``megakd capture``: what a teacher says about a dataset, to a logits store. `capture_plan` refuses."""

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
        description="Store what a teacher says about every token position of a dataset, for any number of students: "
        "its best ids (top_p_k), how often each id was drawn (samples), or drawn ids renormalised "
        "(renormalised_samples), each with the teacher's entropy. 'megakd train --logits-load-dir' reads it, in any "
        "order and layout. Work is committed in shards: any number of ranks and of jobs with the same flags, started "
        "or killed at any time, continue it, and the result does not depend on how many there were. "
        "Alone: megakd capture ...; on several ranks: torchrun --nproc-per-node N --no-python megakd capture ...",
    )
    ignore_known_warnings()
    plan = check_capture(config, world_size())
    from megakd.pipeline.capture.run import (
        capture,  # late: torch and megatron load for seconds, a wrong flag should not
    )

    return int(capture(config, plan))

"""Verb ``megakd prune``: a student cut out of a teacher."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.pipeline.prune.config import PruneConfig
from megakd.pipeline.prune.preflight import check_prune

HELP = "a student cut out of a teacher: layers, heads, neurons and channels (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        PruneConfig,
        argv,
        prog="megakd prune",
        description="Cut a smaller model out of a teacher, as Minitron does (arXiv 2407.14679): the teacher runs over "
        "a calibration set of samples, what its layers, attention heads, feed-forward neurons and channels add to the "
        "result is measured, and the least is left out until the sizes are those asked for. The student is an "
        "ordinary checkpoint in --save: 'megakd train --load SAVE --finetune' distils the teacher into it. Sizes that "
        "are not given stay the teacher's. Alone: megakd prune ...; on several ranks: torchrun --nproc-per-node N "
        "--no-python megakd prune ...",
    )
    ignore_known_warnings()
    plan = check_prune(config, world_size())
    from megakd.pipeline.prune.run import prune  # late: torch and megatron load for seconds, a wrong flag should not

    return int(prune(config, plan))

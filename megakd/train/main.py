"""``megakd train``: pre-train a student, with or without a teacher."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megakd.config.tree import list_leaves, parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.losses.terms import legality_table
from megakd.train.config import TrainConfig
from megakd.train.megatron.dialect import MegatronFlags
from megakd.train.megatron.help import megatron_help
from megakd.train.objective.schedule import schedule_help
from megakd.train.preflight import check_run

HELP = "pre-train a student on an indexed dataset, with or without a teacher (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check everything that can be checked without a process group, then train. Return the exit status."""
    if "--help-megatron" in (sys.argv[1:] if argv is None else argv):
        print("\n".join(megatron_help(list_leaves(TrainConfig))))
        return 0
    config = parse(
        TrainConfig,
        argv,
        prog="megakd train",
        description="Pre-train a student. One process: megakd train ...; several ranks: torchrun "
        "--nproc-per-node N --no-python megakd train ... Options may also be given in a YAML file (--config).",
        epilog=[
            "",
            "divergences (--kd-divergence):",
            *(f"  {line}" for line in legality_table().splitlines()),
            "",
            "schedules (--kd-alpha-schedule, --kd-temperature-schedule):",
            *schedule_help(),
            "",
            "flags of Megatron-LM: --help-megatron lists them, with the meaning that each has here",
        ],
        dialect=MegatronFlags(),
    )
    ignore_known_warnings()
    plan = check_run(config, world_size())
    from megakd.train.loop import train  # late: torch and megatron load for seconds, a wrong flag should not

    return int(train(config, plan))

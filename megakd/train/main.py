"""``megakd train``: pre-train a student, with or without a teacher."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from megakd.config import parse
from megakd.losses.terms import legality_table
from megakd.train.config import TrainConfig
from megakd.train.kd_schedule import schedule_help
from megakd.train.preflight import check_run

HELP = "pre-train a student on an indexed dataset, with or without a teacher (under torchrun or alone)"

# What megatron-core's calls make torch and itself say in every run, and no user can change.
_KNOWN_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
    r"When using sequence parallelism it is recommended to set the environment variable",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check everything that can be checked without a process group, then train. Returns the exit status."""
    config = parse(
        TrainConfig,
        argv,
        prog="megakd train",
        description="Pre-train a student. Alone: python -m megakd train ...; on several ranks: torchrun "
        "--nproc-per-node N -m megakd train ... The same flags can stand in a YAML file (--config).",
        epilog=[
            "",
            "divergences (--kd-divergence):",
            *(f"  {line}" for line in legality_table().splitlines()),
            "",
            "schedules (--kd-alpha-schedule, --kd-temperature-schedule):",
            *schedule_help(),
        ],
    )
    for message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    plan = check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    from megakd.train.loop import train  # late: torch and megatron load for seconds, a wrong flag should not

    return int(train(config, plan))

"""Verb ``megakd evaluate``: held-out data, tasks of lm-eval and files of requests under a frozen model."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.pipeline.evaluate.config import EvaluateConfig
from megakd.pipeline.evaluate.preflight import check_evaluate

HELP = "held-out loss, calibration, agreement with a teacher, and lm-eval's tasks (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        EvaluateConfig,
        argv,
        prog="megakd evaluate",
        description="Evaluate a model: on held-out data (--data-path), on tasks of lm-eval (--tasks; pip install "
        "'megakd[eval]'), on files of ready requests (--requests). Results are written as JSON beside the checkpoint, "
        "shown as a table, and added to the training run's TensorBoard. A checkpoint is evaluated in any layout. "
        "Alone: megakd evaluate ...; on several ranks: torchrun --nproc-per-node N --no-python megakd evaluate ...",
    )
    ignore_known_warnings()
    plan = check_evaluate(config, world_size())
    from megakd.pipeline.evaluate.run import evaluate  # late: torch and megatron load for seconds, refusals do not wait

    return int(evaluate(config, plan))

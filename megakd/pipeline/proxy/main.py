"""``megakd proxy``: fit a small model that predicts score differences of a teacher and a reference (``fit.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.pipeline.proxy.preflight import ProxyConfig, check_proxy

HELP = "fit a small model to the score differences of a sample (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit status."""
    config = parse(
        ProxyConfig,
        argv,
        prog="megakd proxy",
        description="Score a corpus at the price of a small model. Score a sample of it with the teacher and the "
        "reference (megakd score --sample-fraction 0.05, the same for both); this fits a small model to the difference "
        "of the two, and 'megakd score --proxy OUTPUT' then predicts it for all samples, as scores that 'megakd select "
        "--proxy-scores' takes. What it prints says whether to trust it: on a held-out part of the sample, how its "
        "predictions and what one has without them agree with the truth. Any number of ranks, each with the whole "
        "model and other samples: there is no tensor or pipeline parallelism here, because a proxy that does not fit "
        "on one device saves nothing (scoring with it has both). The same command continues a fit that was stopped or "
        "killed. Alone: megakd proxy ...; on several ranks: torchrun --nproc-per-node N --no-python megakd proxy ...",
    )
    ignore_known_warnings()
    plan = check_proxy(config)
    from megakd.pipeline.proxy.fit import fit  # late: torch and megatron load for seconds, a wrong flag should not

    return int(fit(config, plan))

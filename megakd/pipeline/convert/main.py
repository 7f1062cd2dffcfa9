"""``megakd convert``: a Hugging Face folder as a checkpoint of ours (``run.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.pipeline.convert.config import ConvertConfig
from megakd.pipeline.convert.preflight import check_convert

HELP = "convert a model between a Hugging Face folder and a checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit status."""
    config = parse(
        ConvertConfig,
        argv,
        prog="megakd convert",
        description="Write the model of a Hugging Face folder as a checkpoint that every layout can load (TP, PP, EP "
        "of any size), by one process and in a few hundred megabytes of memory. It is not needed before anything else: "
        "train, score, capture, proxy and evaluate read the folder itself (--load FOLDER). Safetensors alone are read, "
        "no pickle and no code.",
    )
    plan = check_convert(config)
    from megakd.pipeline.convert.run import convert  # late: torch loads for seconds, a wrong flag should not

    return int(convert(config, plan))

"""``megakd convert``: models between Hugging Face folders and checkpoints (``run.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.model.huggingface.export_plan import ExportPlan
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
        "of any size), or a checkpoint of any layout as a Hugging Face folder: config.json for transformers 4 and 5, "
        "safetensors, the tokenizer's files; by one process and in a few hundred megabytes of memory beside the "
        "embedding. A checkpoint is megakd's, or one of Megatron-LM's in the form torch_dist. An import is not needed "
        "before anything else: every verb with --load reads the folder itself. Safetensors alone are read, no pickle "
        "and no code. A folder that is written has its name when all of it was "
        "read again and compared with the checkpoint; the same command continues one that was killed.",
    )
    plan = check_convert(config)
    # late: torch loads for seconds, a wrong flag should not
    from megakd.pipeline.convert.run import convert, export_folder

    if isinstance(plan, ExportPlan):
        return int(export_folder(config, plan))
    return int(convert(config, plan))

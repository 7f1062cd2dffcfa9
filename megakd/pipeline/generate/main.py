"""Verb ``megakd generate``: what a model writes behind prompts."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config.tree import parse
from megakd.known_warnings import ignore_known_warnings
from megakd.layout import world_size
from megakd.pipeline.generate.config import GenerateConfig
from megakd.pipeline.generate.preflight import check_generate

HELP = "text that a model writes behind prompts (under torchrun or alone)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; returns its exit status."""
    config = parse(
        GenerateConfig,
        argv,
        prog="megakd generate",
        description="Let a model continue prompts: the most probable token each time, or draws with --temperature, "
        "--top-k and --top-p. A text ends at the end-of-document token, or after --num-tokens-to-generate. What is "
        "written behind a prompt depends on the prompt, the flags and --seed, never on the other prompts, and but for "
        "rounding not on the layout. The text of a single prompt appears while it is written. "
        "Alone: megakd generate ...; on several ranks: torchrun --nproc-per-node N --no-python megakd generate ...",
    )
    ignore_known_warnings()
    plan = check_generate(config, world_size())
    from megakd.pipeline.generate.run import generate  # late: torch and megatron load for seconds, a wrong flag not

    return int(generate(config, plan))

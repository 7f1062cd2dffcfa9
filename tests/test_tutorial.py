"""The tutorial's commands, all of them, in order, with fewer steps and less text than the page has."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import blocks_of, run_block

SHORTER = {
    "train_iters: 200": "train_iters: 3",
    "--train-iters 600": "--train-iters 3",
    "--train-iters 100": "--train-iters 2",
    "lr_warmup_iters: 20": "lr_warmup_iters: 1",
    "eval_interval: 50": "eval_interval: 3",
    "[:168]": "[:10]",
    "--vocab-size 2048": "--vocab-size 512",
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_in_order(tmp_path: Path) -> None:
    for block in blocks_of("tutorial.md", SHORTER):
        run_block(block, tmp_path)
    for file in ("runs/refined/metrics.jsonl", "compare.png", "report/report.html"):
        assert (tmp_path / file).exists()

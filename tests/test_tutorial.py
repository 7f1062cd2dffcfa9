"""The tutorial's commands, all of them, in order, with fewer steps and less text than the page has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
SHORTER = {
    "train_iters: 200": "train_iters: 3",
    "--train-iters 600": "--train-iters 3",
    "--train-iters 100": "--train-iters 2",
    "lr_warmup_iters: 20": "lr_warmup_iters: 1",
    "eval_interval: 50": "eval_interval: 3",
    "[:168]": "[:10]",
    "--vocab-size 2048": "--vocab-size 512",
}


def commands() -> list[str]:
    """The page's blocks of commands, as they are run here."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    shortened = []
    for block in blocks:
        for long, short in SHORTER.items():
            block = block.replace(long, short)
        shortened.append(block)
    return shortened


def test_every_shortening_is_of_the_page() -> None:
    text = PAGE.read_text()
    assert not [long for long in SHORTER if long not in text]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_in_order(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    for block in commands():
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    for file in ("runs/refined/metrics.jsonl", "compare.png", "report/report.html"):
        assert (tmp_path / file).exists()

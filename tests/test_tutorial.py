"""The tutorial's commands, all of them, in order, with fewer steps and less text than the page has."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from forked import ForkedVerb

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
    for block in commands():
        if not block.startswith("megakd"):  # a file is written, then a verb may follow
            script, _, block = block.partition("\nmegakd")
            done = subprocess.run(["bash", "-e", "-c", script + "\n"], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            block = "megakd" + block if block else ""
        for line in block.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            assert program == "megakd"
            verb = ForkedVerb(words, folder=tmp_path)
            output, errors = verb.communicate(timeout=300)
            assert verb.returncode == 0, f"{line}\n{output}\n{errors}"
    for file in ("runs/refined/metrics.jsonl", "compare.png", "report/report.html"):
        assert (tmp_path / file).exists()

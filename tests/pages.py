"""Pages of the documentation whose commands are run, all of them and in their order, made shorter."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from forked import ForkedVerb

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks_of(page: str, shorter: Mapping[str, str]) -> list[str]:
    """Return the page's blocks of commands, as they are run here. shorter: texts and what replaces them."""
    text = (DOCS / page).read_text()
    missing = [long for long in shorter if long not in text]
    assert not missing, f"{page} does not have {missing}"
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.S | re.M)
    for long, short in shorter.items():
        blocks = [block.replace(long, short) for block in blocks]
    return blocks


def run_block(block: str, folder: Path) -> None:
    """Run one block in ``folder``: lines of a shell, then verbs, each of which must succeed."""
    if not block.startswith("megakd"):  # a file is written, then a verb may follow
        script, _, block = block.partition("\nmegakd")
        words = ["bash", "-e", "-c", f'python3() {{ {shlex.quote(sys.executable)} "$@"; }}\n{script}\n']
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        block = "megakd" + block if block else ""
    for line in block.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "megakd"
        verb = ForkedVerb(words, folder=folder)
        output, errors = verb.communicate(timeout=300)
        assert verb.returncode == 0, f"{line}\n{output}\n{errors}"

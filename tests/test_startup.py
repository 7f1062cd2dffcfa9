"""What a process loads before it does anything: answers and refusals must not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megakd.__main__ import VERBS

HEAVY = ("torch", "megatron", "sentencepiece", "tokenizers", "gigatoken", "awkward", "matplotlib", "tensorboard")
REPORT = "import json, sys; print('LOADED ' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``code``, which may exit."""
    wrapped = f"try:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n{REPORT}"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("LOADED ", 1)[1]))


def test_import_loads_the_package_alone() -> None:
    assert loaded_by("import megakd") - loaded_by("pass") <= {"megakd", "__future__"}


def test_loaded_by_would_see_torch() -> None:
    assert "torch" in loaded_by("import torch")


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb: str) -> None:
    loaded = loaded_by(f"from megakd.__main__ import main; main(['{verb}', '--help'])")
    assert "megakd" in loaded and not loaded.intersection(HEAVY)

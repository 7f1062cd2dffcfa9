"""exp2 and log2 of the native kernels, sixteen at a time, on every path that they have, against float64."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
SOURCE = """
#include "simd/vec.h"
using namespace megakd;
extern "C" void apply_exp2(float* x, long n) { for (long i = 0; i < n; i += kLanes) store(x + i, exp2(load(x + i))); }
extern "C" void apply_log2(float* x, long n) { for (long i = 0; i < n; i += kLanes) store(x + i, log2(load(x + i))); }
"""
MARCHES = ["native", "x86-64", "x86-64-v3"] if platform.machine() == "x86_64" else ["native"]


@pytest.fixture(scope="module", params=MARCHES)
def vec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if request.param == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX2")
    folder = tmp_path_factory.mktemp("vec")
    (folder / "vec.cpp").write_text(SOURCE)
    flags = ["-shared", "-fPIC", "-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    command = [
        os.environ.get("CXX", "c++"),
        *flags,
        f"-march={request.param}",
        f"-I{ROOT / 'csrc'}",
        "vec.cpp",
        "-o",
        "vec.so",
    ]
    subprocess.run(command, cwd=folder, check=True, timeout=200)
    return ctypes.CDLL(str(folder / "vec.so"))


def _apply(vec: ctypes.CDLL, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    padded: NDArray[np.float32] = np.ones(-(-len(values) // 16) * 16, np.float32)
    padded[: len(values)] = values
    getattr(vec, name)(padded.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(padded)))
    return padded[: len(values)]


def test_exp2(vec: ctypes.CDLL) -> None:
    pieces = [np.linspace(-125.9, 127.9, 200_001), np.linspace(-1e-3, 1e-3, 1001), np.arange(-125, 128)]
    x = np.concatenate(pieces).astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    assert np.abs(_apply(vec, "apply_exp2", x) / expected - 1).max() <= 2e-7
    assert _apply(vec, "apply_exp2", np.zeros(1, np.float32))[0] == 1  # the largest entry of a row
    ends = np.array([-np.inf, -1e6, -200, 1e6, np.inf, np.nan], np.float32)
    found = _apply(vec, "apply_exp2", ends)
    assert found[:5].tolist() == [0, 0, 0, np.inf, np.inf]
    assert np.isnan(found[5])


def test_log2(vec: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    near = 1 + generator.uniform(-0.5, 1, 100_000) * 2.0 ** -generator.integers(0, 23, 100_000)
    steps = np.nextafter(np.float32(1), np.array([0, 2], np.float32))  # the neighbours of 1
    edges = np.nextafter(np.array([0.75, 0.75, 1.5, 1.5], np.float32), np.array([0, 1, 1, 2], np.float32))
    x = np.concatenate([2.0 ** generator.uniform(-126, 127, 100_000), near, steps, edges]).astype(np.float32)
    expected = np.log2(x.astype(np.float64))
    found = _apply(vec, "apply_log2", x)
    other = x != 1
    assert np.abs(found[other] / expected[other] - 1).max() <= 3e-7
    whole = np.arange(-126, 128)
    assert (_apply(vec, "apply_log2", np.exp2(whole.astype(np.float64)).astype(np.float32)) == whole).all()
    assert _apply(vec, "apply_log2", np.zeros(1, np.float32))[0] == -np.inf
    assert np.isnan(_apply(vec, "apply_log2", np.array([np.nan], np.float32)))[0]

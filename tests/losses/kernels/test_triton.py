"""The Triton kernels: every one compiles for a GPU, and is right, on the GPU or in Triton's interpreter.

The interpreter must be asked for before Triton is imported, and others import it too: so it has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from losses.cases import CASES, sparse_targets
from torch import Tensor

from megakd.losses.adaptive_kl import head_and_tail_gap
from megakd.losses.divergences import DIVERGENCES
from megakd.losses.kernels.gpu.launch import DTYPES, TritonKernels
from megakd.losses.kernels.protocol import Chunk, DenseTeacher, SparseSlope, SparseTeacher
from megakd.losses.sparse import Buckets
from megakd.losses.terms import KDTerm
from megakd.losses.vocab_parallel import RowStatistics, VocabShard

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    ["interpreter", pytest.param("interpreter, all", marks=pytest.mark.long), pytest.param("gpu", marks=gpu)],
)
def test_the_cases(where: str) -> None:
    changed = {} if where == "gpu" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/losses/kernels/triton_cases.py"]
    if where == "interpreter":  # every loss with its gradient; the tables of hostile logits take a minute more
        command += ["-k", "not split_vocabulary and not huge_logits and not ruled_out and not not_finite"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **changed}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]


def test_cpu_is_left_to_others() -> None:
    chunk = Chunk(torch.zeros(4, 8), 8, torch.zeros(4), torch.ones(4))
    assert not TritonKernels().supports(chunk)


class _Recorder(TritonKernels):
    """Writes down what would be launched: the kernel, its argument types, what is constant."""

    def __init__(self) -> None:
        super().__init__(block=256, num_warps=2)
        self.launches: set[tuple[str, tuple[str, ...], tuple[tuple[str, int | str], ...]]] = set()

    def _launch(self, kernel: str, chunk: Chunk, *arguments: Tensor | int | float, **constants: int | str) -> None:
        types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
        types[torch.int64] = "*i64"
        kinds = [
            types[x.dtype] if isinstance(x, Tensor) else "i32" if isinstance(x, int) else "fp32" for x in arguments
        ]
        self.launches.add((kernel, tuple(kinds), tuple(constants.items())))


def _launches() -> _Recorder:
    """Everything that the cases ask for, in bf16; forward KL in every pair of dtypes."""
    recorder = _Recorder()
    labels, weight = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    every = [(case.term, case.kind, torch.bfloat16, torch.bfloat16) for case in CASES]
    every += [(KDTerm(), "dense", student, teacher) for student in DTYPES for teacher in DTYPES]
    for term, kind, student_dtype, teacher_dtype in every:
        teacher = torch.randn(2, 64, dtype=teacher_dtype)
        side: DenseTeacher | SparseTeacher = DenseTeacher(teacher, weight, term)
        slope = None
        if kind != "dense":
            side = SparseTeacher(Buckets.of(sparse_targets(kind, teacher.float()), labels, term, 64).ids_RK, term)
            slope = SparseSlope(weight, weight, torch.ones(side.columns_RK.shape[1], 2))
        chunk = Chunk(torch.zeros(2, 64, dtype=student_dtype), 64, labels, weight, weight, side)
        rows = recorder.statistics(chunk)
        if term.formula == "adaptive_kl":
            head_and_tail_gap(chunk, rows, VocabShard(0, 64, 64, None), recorder)
        if isinstance(side, DenseTeacher) and DIVERGENCES[term.formula].second_pass == ("value", "slope"):
            rows = rows.extended(recorder.second_pass(chunk, rows))
        recorder.gradient(chunk, RowStatistics(rows.columns, rows.values_kR), slope)
    return recorder


@pytest.mark.slow
def test_every_kernel_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a GPU that need not be there, down to its machine code."""
    from megakd.losses.kernels.gpu import gradients as triton_gradients
    from megakd.losses.kernels.gpu import head_search as triton_head_search
    from megakd.losses.kernels.gpu import statistics as triton_statistics

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    kernels = {**vars(triton_statistics), **vars(triton_gradients), **vars(triton_head_search)}
    for name, kinds, constants in sorted(_launches().launches, key=str):
        kernel, given = kernels[name], dict(constants)
        free = [argument for argument in kernel.arg_names if argument not in given]
        assert len(free) == len(kinds), name
        signature = {**dict(zip(free, kinds)), **dict.fromkeys(given, "constexpr")}
        source = triton.compiler.ASTSource(kernel, {n: signature[n] for n in kernel.arg_names}, given)
        assert triton.compile(source, target=target, options={"num_warps": 2}).asm["cubin"], name

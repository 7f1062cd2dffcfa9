"""The CPU layer: what it changes inside megatron-core, and that it changes nothing for anybody else."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megakd import cpu
from megakd.errors import UsageError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the layer is never installed")

ORIGINALS = (torch.zeros, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream)


def test_torch_stays_as_it_was_for_everybody_else() -> None:
    cpu.install()
    now = (torch.zeros, torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device, torch.cuda.Stream)
    assert now == ORIGINALS
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_megatron_gets_the_facade_in_modules_loaded_before_and_after() -> None:
    cpu.install()
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch is not torch and schedules.torch.zeros([2], device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.nn is torch.nn
    late = "megatron.core.models.mimo.config"
    sys.modules.pop(late, None)
    module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    assert module.torch is schedules.torch


def test_installing_twice_changes_nothing() -> None:
    cpu.install()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    tracker, finders = random.CudaRNGStatesTracker, len(sys.meta_path)
    cpu.install()
    assert random.CudaRNGStatesTracker is tracker and len(sys.meta_path) == finders


def test_an_unchecked_megatron_is_refused() -> None:
    with pytest.raises(UsageError, match=r"megatron-core 0\.17\.0 has not been checked on CPU; checked: 0\.16\.1"):
        cpu.check_version("0.17.0")
    with pytest.raises(UsageError, match="gone"):
        cpu._replace("optimizer.clip_grads", "no_such_function", lambda original: original)


def test_the_other_apex_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(UsageError, match="is not NVIDIA's.*pip uninstall apex"):
        cpu.refuse_foreign_apex()
    (tmp_path / "apex" / "optimizers").mkdir()
    cpu.refuse_foreign_apex()


def test_the_tracker_forks_and_returns() -> None:
    cpu.install()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    tracker = random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 11)
    tracker.add("b", 12)
    outside = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracker.fork("a"):
            first = torch.rand(1)
            with tracker.fork("b"):
                inner = torch.rand(1)
            second = torch.rand(1)
    assert torch.equal(torch.get_rng_state(), outside)
    torch.manual_seed(11)
    assert torch.equal(first, torch.rand(1)) and torch.equal(second, torch.rand(1))
    torch.manual_seed(12)
    assert torch.equal(inner, torch.rand(1))
    with pytest.raises(KeyError, match="not added"), tracker.fork("c"):
        pass


def test_type_names_last_only_for_the_call() -> None:
    with cpu._cuda_type_names():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros(1).type() == "torch.FloatTensor"

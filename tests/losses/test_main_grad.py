"""The head's weight gradient straight into megatron's buffer is what megatron's own hook would have put there.

Into it in two ways: in the backward, and by the sweep itself as on a CUDA device.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build_parts, make_config, make_tree, write_dataset
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Worlds

from megakd.losses import logit_sources
from megakd.losses.head import DEFAULT_CHUNK_BYTES, VocabShard, default_chunk_bytes, head_loss
from megakd.train.preflight import check_run


def plain_product(weight_vH: torch.Tensor, d_weight_vH: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The way through autograd and megatron's hook."""
    return (d_weight_vH * grad.to(d_weight_vH.dtype)).to(weight_vH.dtype)


def steps(tree: dict[str, Any], way: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps. way: ``hook``, ``backward`` or ``sweep``."""
    from megakd.losses import head
    from megakd.parallel import init_parallel
    from megakd.train.optim import Optimizer
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    groups = init_parallel(config.parallel, seed=config.training.seed)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    optimizer = Optimizer(config.optim, student, train_iters=config.training.train_iters)
    if way == "sweep":
        objective = replace(objective, weight_grad="main_grad")
    by_hook = way == "hook"
    direct, calls = head.add_to_main_grad, 0

    def count(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (plain_product if by_hook else direct)(*arguments)

    head.add_to_main_grad = count
    try:
        found = []
        for step in range(1, 4):
            optimizer.zero_grad()
            loss = run_step(student, next(batches), teacher, objective, groups, step=step)
            weight = student.chunks[-1].output_weight() if groups.is_last_stage else None
            if weight is not None:
                assert weight.grad_added_to_main_grad != by_hook, "the buffer is filled by whom it should be"
            found.append((loss.loss, optimizer.step(step).grad_norm))
    finally:
        head.add_to_main_grad = direct
    assert calls == (3 * 2 if groups.is_last_stage and way != "sweep" else 0), (
        "two microbatches a step: the second adds to the first"
    )
    return found


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("parallel", "bf16"), [({}, False), ({"overlap_grad_reduce": True}, False), (DISTRIBUTED, True)], ids=str
)
def test_direct_equals_the_hook(
    tied: bool, stages: int, parallel: dict[str, Any], bf16: bool, world: Worlds, tmp_path: Path
) -> None:
    tree = make_tree(
        write_dataset(tmp_path / "data"),
        student={"untie_embeddings_and_output_weights": not tied, "bf16": bf16, "init_method_std": 0.1},
        parallel={"pipeline_model_parallel_size": stages, **parallel},
    )
    ranks = world(2 * stages)
    by_hook, backward, sweep = (ranks.run(steps, tree, way) for way in ("hook", "backward", "sweep"))
    rel = 1e-2 if bf16 else 1e-6  # the hook's way rounds the gradient of each microbatch to the weight's dtype
    for ways, bound in ((zip(backward, by_hook), rel), (zip(sweep, backward), 1e-6)):
        for one, other in ways:
            for found, expected in zip(one, other, strict=True):
                assert found == pytest.approx(expected, rel=bound)


def test_the_sweep_fills_the_buffer_itself() -> None:
    """No sum of its own, another microbatch on top, and an incoming gradient other than 1 fails instead of training."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(7, 5), torch.randint(0, 13, (7,))
    weight = torch.nn.Parameter(torch.randn(13, 5))
    arguments = {"shard": VocabShard(0, 13, 13, None), "lm_weight_T": torch.rand(7), "chunk_bytes": 3 * 13 * 4}
    head_loss(hidden, weight, labels, **arguments).loss.backward()
    assert weight.grad is not None
    expected, weight.grad = weight.grad, None
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(13, 5), False  # type: ignore[attr-defined]
    for count in (1, 2):
        head_loss(hidden, weight, labels, weight_grad="main_grad", **arguments).loss.backward()
        torch.testing.assert_close(weight.main_grad, count * expected)
    assert weight.grad_added_to_main_grad
    with pytest.raises(RuntimeError):
        (2 * head_loss(hidden, weight, labels, weight_grad="main_grad", **arguments).loss).backward()
    weight.main_grad = torch.zeros(13, 5, dtype=torch.bfloat16)  # too narrow to be a sum
    head_loss(hidden, weight, labels, weight_grad="main_grad", **arguments).loss.backward()
    torch.testing.assert_close(weight.main_grad.float(), expected, rtol=2e-2, atol=2e-2)


def test_the_product_on_cuda_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """In shapes alone, for CPUs lack this product: torch takes the transposed bf16 gradient and the fp32 sum."""
    monkeypatch.setitem(logit_sources._ADD_WIDER, "meta", logit_sources._ADD_WIDER["cuda"])
    sum_vH, gradient_Rv = torch.zeros(13, 5, device="meta"), torch.zeros(7, 13, device="meta", dtype=torch.bfloat16)
    with _Calls() as calls:
        logit_sources._add_product_inplace(sum_vH, gradient_Rv, gradient_Rv.new_zeros(7, 5))
    assert calls.names == ["aten.new_zeros.default", "aten.t.default", "aten.addmm.dtype_out"]


def test_chunks_on_cuda_are_larger() -> None:
    """Each of them passes over the whole fp32 gradient of the weight."""
    assert default_chunk_bytes(torch.device("cpu")) == DEFAULT_CHUNK_BYTES == 256 << 20
    assert default_chunk_bytes(torch.device("cuda", 3)) == 1 << 30


class _Calls(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

"""The head's weight gradient straight into megatron's buffer is what megatron's own hook would have put there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build_parts, make_config, make_tree, write_dataset
from worlds import Worlds

from megakd.train.preflight import check_run


def plain_product(weight_vH: torch.Tensor, d_weight_vH: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The way through autograd and megatron's hook."""
    return (d_weight_vH * grad.to(d_weight_vH.dtype)).to(weight_vH.dtype)


def steps(tree: dict[str, Any], by_hook: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of three steps."""
    from megakd.losses import head
    from megakd.parallel import init_parallel
    from megakd.train.optim import Optimizer
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    groups = init_parallel(config.parallel, seed=config.training.seed)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    optimizer = Optimizer(config.optim, student, train_iters=config.training.train_iters)
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
    assert calls == (3 * 2 if groups.is_last_stage else 0), "two microbatches a step: the second adds to the first"
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
    direct, by_hook = (ranks.run(steps, tree, flag) for flag in (False, True))
    rel = 1e-2 if bf16 else 1e-6  # the hook's way rounds the gradient of each microbatch to the weight's dtype
    for one, other in zip(direct, by_hook):
        for found, expected in zip(one, other, strict=True):
            assert found == pytest.approx(expected, rel=rel)

"""AdamW against torch's, the learning-rate shapes against their formulas, and no update from a non-finite number."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import build_parts, make_config, make_tree, write_dataset
from worlds import Worlds

from megakd.train import fused_adam
from megakd.train.config import OptimConfig
from megakd.train.fused_adam import AdamW
from megakd.train.lr_schedule import build_lr_schedule, set_rate
from megakd.train.preflight import check_run


@pytest.mark.parametrize("way", ["_update_in_passes", "_update_in_one_pass"])
def test_adamw_equals_torch(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either way; the one of CUDA devices, whose kernel torch has for CPUs too, counts steps in fp32."""
    monkeypatch.setitem(fused_adam._UPDATES, "cpu", getattr(fused_adam, way))
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, dtype=torch.float64), torch.randn(13, dtype=torch.float64)]
    theirs = [tensor.clone() for tensor in ours]
    settings: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    one, other = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs):
        bound = {"rtol": 1e-12, "atol": 1e-14} if way == "_update_in_passes" else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(a, b, **bound)
    assert set(one.state[ours[0]]) == {"exp_avg", "exp_avg_sq"} and one.param_groups[0]["step"] == 20


class EngineLinear(torch.nn.Linear):
    """A layer with the flag of Transformer Engine's, which adds its weight's gradient to the buffer by itself."""

    fuse_wgrad_accumulation = False


def fused_layers(tree: dict[str, Any]) -> list[bool]:
    """The flag of a planted layer before and after data parallelism, and whether megatron's own were told to fuse."""
    from megakd.layout import ParallelConfig
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel
    from megakd.train.optim import wrap_student

    plan = check_run(make_config(tree), 1)
    groups = init_parallel(ParallelConfig(), seed=1)
    (chunk,) = build_model(plan.student, groups, vocab_size=plan.vocab_size, seq_length=plan.seq_length)
    chunk.decoder.layers[0].planted = EngineLinear(3, 5)
    found = [chunk.decoder.layers[0].planted.fuse_wgrad_accumulation]
    wrap_student([chunk], groups.parallel, groups)
    planted = chunk.decoder.layers[0].planted
    assert planted.weight.main_grad.dtype == torch.float32
    return [*found, planted.fuse_wgrad_accumulation, chunk.output_layer.gradient_accumulation_fusion]


def test_engine_layers_fuse_without_apex(tmp_path: Path, world: Worlds) -> None:
    tree = make_tree(write_dataset(tmp_path / "data"))
    assert world(1).run(fused_layers, tree) == [[False, True, False]]


class Holder:
    """What the schedule needs of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]


def rates(optim: OptimConfig, steps: int) -> list[float]:
    schedule = build_lr_schedule(optim, Holder(), train_iters=steps)
    found = []
    for step in range(1, steps + 1):
        rate = set_rate(schedule, step - 1)
        assert schedule.optimizer.param_groups[0]["lr"] == rate
        found.append(rate)
    return found


SHAPES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd(shape: Any) -> None:
    optim = OptimConfig(
        lr=1.0, min_lr=0.1, lr_decay_style="WSD", lr_wsd_decay_style=shape, lr_warmup_iters=10, lr_wsd_decay_iters=20
    )
    found = rates(optim, 100)
    for finished, rate in enumerate(found):
        if finished <= 10:
            expected = finished / 10
        elif finished <= 80:
            expected = 1.0
        else:
            expected = 0.1 + 0.9 * SHAPES[shape]((finished - 80) / 20)
        assert rate == pytest.approx(expected, abs=1e-12), finished


def test_cosine_and_its_end() -> None:
    found = rates(OptimConfig(lr=2.0, min_lr=0.2, lr_warmup_iters=4, lr_decay_iters=24), 30)
    for finished, rate in enumerate(found):
        x = (finished - 4) / 20
        expected = finished / 2 if finished <= 4 else 0.2 + 1.8 * SHAPES["cosine"](min(x, 1.0))
        assert rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_every_step_after_the_warm_up_begins_trains(style: Any, warmup: int) -> None:
    """Megatron's convention: the rate of step 1 is the schedule's at 0, that of the last not yet what it ends with."""
    optim = OptimConfig(lr=1.0, lr_decay_style=style, lr_warmup_iters=warmup, lr_wsd_decay_iters=2)
    found = rates(optim, 6)
    assert found[0] == (0.0 if warmup else 1.0) and min(found[1:]) > 0
    assert rates(OptimConfig(lr=1.0, lr_decay_style=style), 1) == [1.0], "a run of one step"


def poisoned_step(tree: dict[str, Any], where: str) -> str:
    """One step with a NaN planted in a weight or a gradient; the error's text, if nothing was applied."""
    from megakd.errors import NonFiniteError
    from megakd.parallel import init_parallel
    from megakd.train.optim import Optimizer
    from megakd.train.step import run_step

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    groups = init_parallel(config.parallel, seed=5)
    student, teacher, objective, batches = build_parts(config, plan, groups)
    optimizer = Optimizer(config.optim, student, train_iters=4)
    layer = student.chunks[0].decoder.layers[0].mlp.linear_fc2
    if where == "weight" and groups.rank == 0:
        with torch.no_grad():
            layer.weight[0, 0] = math.nan
    before = [parameter.detach().clone() for parameter in student.chunks[0].parameters()]
    optimizer.zero_grad()
    try:
        run_step(student, next(batches), teacher, objective, groups, step=7)
        if where == "gradient" and groups.rank == 1:
            layer.weight.main_grad[0, 0] = math.inf
        optimizer.step(7)
    except NonFiniteError as error:
        after = list(student.chunks[0].parameters())
        same = all(torch.equal(a.nan_to_num(), b.detach().nan_to_num()) for a, b in zip(before, after))
        return f"{error} | unchanged: {same}"
    return "applied"


@pytest.mark.parametrize(
    ("where", "expected"), [("weight", "the loss is not finite (rank"), ("gradient", "gradient norm")]
)
@pytest.mark.parametrize("parallel", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_no_rank_applies_a_non_finite_step(
    where: str, expected: str, parallel: dict[str, int], world: Worlds, tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "data")
    for text in world(2).run(poisoned_step, make_tree(data, parallel=parallel), where):
        assert expected in text and "step 7" in text and text.endswith("unchanged: True")
        assert where == "gradient" or "dataset 0 sample" in text

"""The calibration error against a loop over tokens and bins: of one call, of many, and in any layout of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import make_tree, run_training, write_dataset
from torch import Tensor
from worlds import Worlds

from megakd.errors import UsageError
from megakd.losses.calibration import NUM_BINS, calibration_error, calibration_sums
from megakd.losses.head import KDTerm, VocabShard

T, V, ROWS, HIDDEN = 403, 251, 256, 16


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head whose padding would be the best id, labels that are often right, and a mask."""
    generator = torch.Generator().manual_seed(5)
    hidden_TH = torch.randn(T, HIDDEN, dtype=torch.float64, generator=generator)
    hidden_TH *= torch.linspace(0.01, 1.5, T)[:, None]  # from no confidence to much
    weight_VH = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator)
    weight_VH[V:] *= 9
    best_T = (hidden_TH @ weight_VH[:V].t()).argmax(-1)
    other_T = torch.randint(0, V, (T,), generator=generator)
    labels_T = torch.where(torch.rand(T, generator=generator) < 0.6, best_T, other_T)
    mask_T = torch.rand(T, generator=generator) > 0.2
    hidden_TH[~mask_T] = torch.nan
    return hidden_TH, weight_VH, labels_T, mask_T


def twin(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, mask_T: Tensor) -> float:
    """Every token put into its bin, every bin compared."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for token in mask_T.nonzero().flatten().tolist():
        probabilities = (hidden_TH[token] @ weight_VH[:V].t()).softmax(-1)
        confidence, best = float(probabilities.max()), int(probabilities.argmax())
        bins[math.ceil(confidence * NUM_BINS) - 1].append((confidence, best == int(labels_T[token])))
    total = sum(len(found) for found in bins)
    assert sum(bool(found) for found in bins) == NUM_BINS, "the problem should fill every bin"
    means = [(sum(c for c, _ in found) / len(found), sum(r for _, r in found) / len(found)) for found in bins]
    return sum(len(found) / total * abs(right - sure) for found, (sure, right) in zip(bins, means))


def sums(start: int, stop: int) -> Tensor:
    hidden_TH, weight_VH, labels_T, mask_T = inputs()
    size = dist.get_world_size() if dist.is_initialized() else 1
    rows = ROWS // size
    first = rows * (dist.get_rank() if size > 1 else 0)
    part = slice(start, stop)
    return calibration_sums(
        hidden_TH[part],
        weight_VH[first : first + rows],
        labels_T[part],
        mask_T[part],
        shard=VocabShard(first, rows, V, dist.group.WORLD if size > 1 else None),
        implementation="auto",
        chunk_bytes=1 << 14,
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_the_twin_in_one_call_and_in_many(size: int, world: Worlds) -> None:
    expected, num_tokens = twin(*inputs()), int(inputs()[3].sum())
    assert expected > 0.05
    for whole, first, second in zip(
        world(size).run(sums, 0, T), world(size).run(sums, 0, 100), world(size).run(sums, 100, T)
    ):
        assert calibration_error(whole, num_tokens) == pytest.approx(expected, rel=1e-9)
        assert calibration_error(first + second, num_tokens) == pytest.approx(expected, rel=1e-9)


def test_no_tokens() -> None:
    """A microbatch may be masked whole; a whole evaluation may not."""
    hidden_TH, weight_VH, labels_T, mask_T = inputs()
    nothing = calibration_sums(
        hidden_TH,
        weight_VH,
        labels_T,
        torch.zeros_like(mask_T),
        shard=VocabShard(0, ROWS, V, None),
        implementation="auto",
        chunk_bytes=1 << 14,
    )
    assert not nothing.any()
    with pytest.raises(UsageError, match="0 tokens"):
        calibration_error(nothing, 0)


def test_only_evaluation_pays_for_it() -> None:
    from megakd.train.objective.objective import Objective  # late: megatron takes seconds on each of the ranks above

    objective = Objective(0.5, KDTerm(), VocabShard(0, ROWS, V, None), False)
    hidden_TH, weight_VH, labels_T, mask_T = inputs()
    arguments = hidden_TH[:, None], weight_VH, labels_T[:, None], mask_T[:, None], None
    alone = replace(objective, alpha=0.0, term=None)
    assert alone(*arguments).calibration is None
    for held_out in (alone.held_out(), objective.held_out(with_teacher=False)):
        found = held_out(*arguments).calibration
        assert found is not None
        assert calibration_error(found, int(mask_T.sum())) == pytest.approx(twin(*inputs()), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tp2", "sp", "pp2", "cp2", "dp2"])
def test_layouts_agree(name: str, world: Worlds, tmp_path: Path) -> None:
    """Of one checkpoint, with more microbatches too."""
    layouts = {
        "tp2": {"tensor_model_parallel_size": 2},
        "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp2": {"pipeline_model_parallel_size": 2},
        "cp2": {"context_parallel_size": 2},
        "dp2": {},
    }
    data, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    groups = {
        "data": {"valid_data_path": [data]},
        "optim": {"lr": 1e-2},
        "evaluate": {"eval_interval": 4, "eval_iters": 3},
        "checkpoint": {"save": str(save)},
    }
    assert world(1).run(run_training, make_tree(data, **groups)) == [0]
    groups["evaluate"] = {**groups["evaluate"], "skip_train": True}
    split = make_tree(data, **groups, parallel=layouts[name], training={"micro_batch_size": 1})
    assert set(world(2).run(run_training, split)) == {0}
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    one, two = (record["valid"]["calibration_error"] for record in records if "valid" in record)
    assert 0 < one < 1 and two == pytest.approx(one, abs=1e-5)
    assert not [record for record in records if "calibration_error" in record]

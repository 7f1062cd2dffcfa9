"""A step that is refused costs no work: what was trained is saved, and the same command goes on exactly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured import GHOST, capture, make_stores, stored
from runs import losses, make_config, make_tree, run_training, weights
from worlds import Worlds

from megakd.data.blend import Blend
from megakd.logits.spec import shard_path
from megakd.train.preflight import check_run

STEP = 3  # the one that is refused
SPEC = {"top_k": 12, "top_p": 0.95, "value_bits": 16, "shard_samples": 4}


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("refused")
    made = make_stores(world, folder, ())
    made["store"] = str(folder / "store")
    world(1).run(capture, made["data"], made["teacher"], made["store"], SPEC)
    return made


def tree_of(
    setting: dict[str, str], save: Path, *stores: str, async_save: bool = False, **groups: dict[str, Any]
) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "training": {"train_iters": 5},
        "student": {"hidden_dropout": 0.1},  # random numbers, which the refused step has used
        "checkpoint": {"save": str(save), "save_interval": 4, "async_save": async_save},
        **groups,
    }
    return stored(setting, *stores, objective=GHOST, **tree) if stores else make_tree(setting["data"], **tree)


def samples_of_step(tree: dict[str, Any], step: int) -> list[int]:
    """Ids in the order of the step; of the first dataset."""
    size = tree["training"]["global_batch_size"]
    return [int(sample) for sample in blend_of(tree).draw(np.arange((step - 1) * size, step * size)).sample_id]


def blend_of(tree: dict[str, Any]) -> Blend:
    return check_run(make_config({**tree, "parallel": {}}), 1).blend


def error_of_training(tree: dict[str, Any], change: str, *details: Any) -> tuple[str, int, str]:
    """What a run on this rank ends with where ``change`` comes about as step STEP begins."""
    from megakd.train import loop
    from megakd.train.objective import objective

    run_step, weigh = loop.run_step, objective.Objective.__call__

    def changed(*arguments: Any, step: int, **keywords: Any) -> Any:
        if step == STEP:
            torch.distributed.barrier()
            CHANGES[change](*details)
        return run_step(*arguments, step=step, **keywords)

    loop.run_step = changed
    try:
        run_training(tree)
    except ValueError as error:
        return type(error).__name__, int(error.status), str(error)  # type: ignore[attr-defined]
    finally:
        loop.run_step, objective.Objective.__call__ = run_step, weigh  # type: ignore[method-assign]
    return "", 0, ""


def flip(store: str, sample: int) -> None:
    path = shard_path(Path(store), sample // 4)
    if os.environ["RANK"] == "0":
        start = int(np.fromfile(path.with_suffix(".index"), "<u8", 5)[sample % 4])
        with open(path.with_suffix(".rows"), "r+b") as file:
            file.seek(start + 20)
            byte = file.read(1)[0]
            file.seek(start + 20)
            file.write(bytes([byte ^ 4]))
    torch.distributed.barrier()


def remove(store: str, sample: int) -> None:
    if os.environ["RANK"] == "0":
        for path in shard_path(Path(store), sample // 4).parent.glob(f"{sample // 4:08d}.*"):
            path.unlink()
    torch.distributed.barrier()


def poison(labels_S: list[int], of_loss: bool) -> None:
    """The gradient of one sample is not finite from here on, or its loss: the sample with these labels."""
    from megakd.train.objective import objective

    weigh = objective.Objective.__call__

    def poisoned(self: Any, hidden_SBH: Any, weight_vH: Any, labels_SB: Any, *rest: Any, **known: Any) -> Any:
        here_B = (labels_SB == torch.tensor(labels_S)[:, None]).all(0)
        bad_1B1 = torch.where(here_B, torch.nan, 1.0)[None, :, None]
        if of_loss:
            hidden_SBH = hidden_SBH * bad_1B1
        elif hidden_SBH.requires_grad:
            hidden_SBH = hidden_SBH * 1.0
            hidden_SBH.register_hook(lambda gradient: gradient * bad_1B1)
        return weigh(self, hidden_SBH, weight_vH, labels_SB, *rest, **known)

    objective.Objective.__call__ = poisoned  # type: ignore[method-assign]


def plant() -> None:
    """A gradient overflows that no microbatch's is."""
    from megakd.train.optim import Optimizer

    step = Optimizer.step

    def planted(self: Any, *where: int) -> Any:
        Optimizer.step = step  # type: ignore[method-assign]
        next(self._student.chunks[0].parameters()).main_grad.view(-1)[0] = torch.inf
        return step(self, *where)

    Optimizer.step = planted  # type: ignore[method-assign]


CHANGES = {"flip": flip, "remove": remove, "poison": poison, "plant": plant}
TP2 = {"tensor_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "size", "parallel", "background"),
    [
        pytest.param("flip", 1, {}, False, marks=pytest.mark.long),
        pytest.param("remove", 2, OVERLAPPED, True, marks=pytest.mark.long),
        pytest.param("flip", 2, PP2, True, marks=pytest.mark.slow),
        pytest.param("remove", 2, TP2, False, marks=pytest.mark.long),
    ],
)
def test_damage_in_a_store_costs_no_step(
    change: str,
    size: int,
    parallel: dict[str, Any],
    background: bool,
    setting: dict[str, str],
    world: Worlds,
    tmp_path: Path,
) -> None:
    store, whole, cut = tmp_path / "store", tmp_path / "whole", tmp_path / "cut"
    shutil.copytree(setting["store"], store)
    trees = [tree_of(setting, one, str(store), parallel=parallel, async_save=background) for one in (whole, cut)]
    assert set(world(size).run(run_training, trees[0])) == {0}
    sample = samples_of_step(trees[1], STEP)[-1]
    for error, code, text in world(size).run(error_of_training, trees[1], change, str(store), sample):
        assert (error, code) == ("CorruptError", 5), text
        assert text.startswith(f"step {STEP}, rank ") and text.endswith("the step was not applied")
    assert (cut / "latest_checkpointed_iteration.txt").read_text().strip() == str(STEP - 1)
    shutil.rmtree(store)
    shutil.copytree(setting["store"], store)  # as when it is repaired
    assert set(world(size).run(run_training, trees[1])) == {0}
    assert losses(cut) == losses(whole)
    assert world(1).run(weights, str(cut), 5) == world(1).run(weights, str(whole), 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "parallel", "of_loss"),
    [
        (2, {}, False),
        (2, {}, True),
        pytest.param(2, TP2, False, marks=pytest.mark.long),
        pytest.param(4, {**INTERLEAVED, **OVERLAPPED}, False, marks=pytest.mark.long),
    ],
)
def test_a_gradient_that_is_not_finite_names_the_samples(
    size: int, parallel: dict[str, Any], of_loss: bool, setting: dict[str, str], world: Worlds, tmp_path: Path
) -> None:
    """And leaves the steps before it, their rows of the journal included."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trees = [
        tree_of(setting, one, parallel=parallel, logits_save={"dir": str(one / "logits"), "top_k": 5})
        for one in (whole, cut)
    ]
    assert set(world(size).run(run_training, trees[0])) == {0}
    sample = samples_of_step(trees[1], STEP)[-1]
    labels_S = labels(trees[1], sample)
    found = world(size).run(error_of_training, trees[1], "poison", labels_S, of_loss)
    data_ranks = size // (2 if parallel else 1)
    for error, code, text in found:
        assert (error, code) == ("NonFiniteError" if of_loss else "NonFiniteGradientError", 1)
        assert text.startswith(f"step {STEP}: the {'loss is not finite' if of_loss else 'gradient norm is nan'} (rank ")
        assert text.endswith("; the step was not applied") and f"dataset 0 sample {sample}" in text
        assert text.count("rank") == 1 and f"rank {min(data_ranks, 2) - 1}: " in text, "the others' are sound"
    assert (cut / "latest_checkpointed_iteration.txt").read_text().strip() == str(STEP - 1)
    assert set(world(size).run(run_training, trees[1])) == {0}
    assert losses(cut) == losses(whole)
    assert met(cut / "logits") == met(whole / "logits")


def labels(tree: dict[str, Any], sample: int) -> list[int]:
    return [int(token) for token in blend_of(tree).datasets[0].read(np.array([sample]))[0, 1:]]


def met(journal: Path) -> list[list[int]]:
    """Every sample with its step, over all segments."""
    records = [np.fromfile(path, "<i8").reshape(-1, 2).tolist() for path in journal.glob("*/segments/*.records")]
    return sorted(record for segment in records for record in segment)


def test_a_sum_that_overflows_tells_the_samples_of_the_step(
    setting: dict[str, str], world: Worlds, tmp_path: Path
) -> None:
    tree = tree_of(setting, tmp_path / "run")
    ((error, _, text),) = world(1).run(error_of_training, tree, "plant")
    assert error == "NonFiniteGradientError" and "in the sum over the step's samples alone" in text
    assert f"dataset 0 sample {samples_of_step(tree, STEP)[0]}, " in text

"""TAID's weight: its rule step by step, and that a run that was cut goes on with the same weights and losses."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.artefacts.manifest import read_manifest, write_manifest
from megakd.config.tree import parse
from megakd.errors import MismatchError
from megakd.train.config import TrainConfig
from megakd.train.objective.taid import Taid
from megakd.train.preflight import check_run

LOSSES = [2.0, 1.5, 1.6, 0.9, 30.0, 0.0, 0.4, 0.3]


def make(**changes: Any) -> Taid:
    return Taid(**{"t_start": 0.4, "t_end": 1.0, "alpha": 0.3, "beta": 0.9, "train_iters": 20} | changes)


def test_the_rule() -> None:
    """Algorithm 1 written out again, after the paper."""
    taid, t, momentum = make(), 0.4, 0.0
    taid = taid.advance(1, LOSSES[0])
    assert taid.t == 0.4, "one loss alone says nothing"
    for step, (before, loss) in enumerate(itertools.pairwise(LOSSES), start=2):
        momentum = 0.9 * momentum + 0.1 * (before - loss) / (before + 1e-15)
        t = min(1.0, max(0.4 + 0.6 * step / 20, t + 0.3 / (1 + math.exp(-momentum)) * (1 - t)))
        taid = taid.advance(step, loss)
        assert taid.t == pytest.approx(t, rel=1e-12)
        if loss == 0.0:
            return  # the relative change after it is of the order of 1/epsilon
    raise AssertionError("the losses have changed")


def test_it_never_falls_and_ends_at_its_end() -> None:
    taid, seen = make(alpha=0.0, t_end=0.9), []
    for step in range(1, 21):
        taid = taid.advance(step, LOSSES[step % len(LOSSES)])
        seen.append(taid.t)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(0.9)
    assert seen[9] == pytest.approx(0.4 + 0.5 * 10 / 20), "with alpha 0 it is the line"
    quick = make(alpha=1.0)
    for step in range(1, 21):
        quick = quick.advance(step, LOSSES[step % len(LOSSES)])
    assert quick.t == 1.0


def test_its_state_is_all_of_it() -> None:
    whole, cut = make(), make()
    for step, loss in enumerate(LOSSES, start=1):
        whole = whole.advance(step, loss)
        cut = cut.advance(step, loss)
        state = json.loads(json.dumps(cut.state()))
        cut = make().restored(state)
        assert cut.t == whole.t


TAID = {"kd_divergence": "taid", "taid_alpha": 0.6, "taid_beta": 0.5}


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("taid")
    data, teacher = write_dataset(folder / "data"), str(folder / "teacher")
    tree = make_tree(data, training={"train_iters": 10}, checkpoint={"save": teacher}, optim={"lr": 1e-2})
    assert world(1).run(run_training, tree) == [0]
    return {"data": data, "teacher": teacher}


def record(folder: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in ("loss", "kd_loss", "taid_t", "grad_norm")) for line in lines if "loss" in line]


def run_tree(setting: dict[str, Any], save: Path, parallel: dict[str, Any], **training: Any) -> dict[str, Any]:
    return make_tree(
        setting["data"],
        training={"train_iters": 8, **training},
        teacher={"load": setting["teacher"]},
        objective=TAID,
        checkpoint={"save": str(save)},
        parallel=parallel,
    )


@pytest.mark.long
def test_a_cut_run_continues_to_the_bit(setting: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    tp2, pp2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    whole, cut, moved = tmp_path / "whole", tmp_path / "cut", tmp_path / "moved"
    assert set(world(2).run(run_training, run_tree(setting, whole, tp2))) == {0}
    assert set(world(2).run(run_training, run_tree(setting, cut, tp2, exit_interval=3))) == {75}
    shutil.copytree(cut, moved)
    for folder, then in ((cut, tp2), (moved, pp2)):
        assert set(world(2).run(run_training, run_tree(setting, folder, then))) == {0}
    found = record(whole)
    weights = [t for _, _, t, _ in found]
    assert weights[:2] == [0.4, 0.4] and weights == sorted(weights) and len(set(weights)) == 7
    assert any(t > 0.4 + 0.6 * step / 8 + 0.01 for step, t in enumerate(weights)), "the line alone would need no state"
    assert record(cut) == found
    for one, other in zip(record(moved), found):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_checkpoints_without_its_state(setting: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    """Those written before there was any load where it is not needed; where it is they are refused."""
    save = tmp_path / "run"
    tree = make_tree(setting["data"], training={"train_iters": 2}, checkpoint={"save": str(save)})
    tree["teacher"] = {"load": setting["teacher"]}
    assert world(1).run(run_training, tree) == [0]
    path = save / "iter_0000002" / "manifest.json"
    old = read_manifest(path)
    parameters = {key: value for key, value in old.parameters.items() if key != "objective_state"}
    assert len(parameters) == len(old.parameters) - 1
    write_manifest(
        path,
        format=old.format,
        version=old.version,
        parameters=parameters,
        parents=old.parents,
        tokenizer=old.tokenizer,
        files=old.files,
    )
    tree["training"]["train_iters"] = 3
    assert world(1).run(run_training, tree) == [0]
    tree["objective"] = TAID
    with pytest.raises(MismatchError, match="no state of taid"):
        check_run(make_config(tree), 1)
    fresh = {**tree, "checkpoint": {"load": str(save), "finetune": True, "save": str(tmp_path / "fresh")}}
    assert world(1).run(run_training, fresh) == [0]


def test_the_example() -> None:
    folder = Path(__file__).resolve().parents[3] / "examples" / "online_kd"
    files = [f"--config={folder / name}" for name in ("config.yaml", "taid.yaml")]
    config = parse(TrainConfig, [*files, "--kd-alpha", "0.8"], prog="megakd train", description="")
    assert config.trains_taid and config.objective.kd_alpha == 0.8 and config.objective.kd_entropy_gate == 0.15
    assert config.training.train_iters == 45000

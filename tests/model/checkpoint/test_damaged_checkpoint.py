"""A checkpoint with a flipped byte is used by nothing: refused by name and block, with the way to the one before it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline.score.score_runs import run_score
from runs import losses, make_config, make_tree, run_training, write_dataset
from worlds import RankError, Worlds

from megakd.__main__ import run
from megakd.artefacts import durable_files as durable
from megakd.artefacts import manifest
from megakd.artefacts.manifest import faults_in_blocks, hash_file, read_manifest, write_manifest
from megakd.errors import CorruptError, UsageError
from megakd.model.checkpoint.record import latest_iteration, read_record
from megakd.pipeline.datasets import verify
from megakd.train.preflight import check_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> dict[str, str]:
    """Data, and a run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("damaged")
    data, run = write_dataset(folder / "data"), folder / "run"
    assert world(1).run(run_training, run_tree(data, run)) == [0]
    return {"data": data, "run": str(run)}


def run_tree(data: str, save: Path, **groups: Any) -> dict[str, Any]:
    checkpoint = {"save": str(save), "save_interval": 2, **groups.pop("checkpoint", {})}
    return make_tree(data, checkpoint=checkpoint, optim={"lr": 3e-3, "lr_decay_style": "constant"}, **groups)


def flip(path: Path, position: float) -> None:
    """One bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[min(int(position * len(content)), len(content) - 1)] ^= 16
    path.write_bytes(content)


@pytest.fixture
def damaged(made: dict[str, str], tmp_path: Path) -> Callable[[str, float], Path]:
    def make(file: str, position: float) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(made["run"], folder)
        flip(folder / "iter_0000004" / file, position)
        return folder

    return make


WAY_OUT = r"iter_0000002 before it is whole: {} 2 starts from there"


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("file", ["common.pt", ".metadata", "metadata.json", "manifest.json"])
def test_small_files_are_refused_before_the_run(
    made: dict[str, str], damaged: Callable[[str, float], Path], file: str, position: float
) -> None:
    folder = damaged(file, position)
    expected = f"iter_0000004 is damaged: .*{re.escape(file)}.*" + WAY_OUT
    with pytest.raises(CorruptError, match="--save: .*" + expected.format("--ckpt-step")):
        check_run(make_config(run_tree(made["data"], folder)), 1)
    with pytest.raises(CorruptError, match="teacher: .*" + expected.format("--teacher-iteration")):
        check_run(make_config(make_tree(made["data"], teacher={"load": str(folder)})), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "file", "position"),
    [("resume", "__0_0.distcp", 0.5), ("finetune", "__0_1.distcp", 1.0), ("teacher", "__0_0.distcp", 0.0)],
)
def test_tensors_are_refused_by_every_rank(
    made: dict[str, str], damaged: Callable[[str, float], Path], world: Worlds, use: str, file: str, position: float
) -> None:
    folder = damaged(file, position)
    trees = {
        "resume": run_tree(made["data"], folder, training={"train_iters": 6}),
        "finetune": make_tree(made["data"], checkpoint={"load": str(folder), "finetune": True}),
        "teacher": make_tree(made["data"], teacher={"load": str(folder)}),
    }
    flag = "--teacher-iteration" if use == "teacher" else "--ckpt-step"
    with pytest.raises(RankError) as caught:
        world(2).run(run_training, trees[use])
    found = re.findall(rf"CorruptError: .*{file}: block 0 .*{WAY_OUT.format(flag)}", str(caught.value))
    assert len(found) == 2, str(caught.value)


@pytest.mark.slow
def test_scores_are_of_what_was_checked(
    made: dict[str, str], damaged: Callable[[str, float], Path], world: Worlds, tmp_path: Path
) -> None:
    folder = damaged("__0_0.distcp", 0.5)
    tree = {"data_path": made["data"], "load": str(folder), "seq_length": 16, "output": str(tmp_path / "scores")}
    with pytest.raises(
        RankError, match=r"CorruptError: --load: .*__0_0.distcp: block 0.*" + WAY_OUT.format("--iteration")
    ):
        world(1).run(run_score, tree)
    assert not (tmp_path / "scores" / "scores.json").exists()
    assert world(1).run(run_score, {**tree, "iteration": 2}) == [0]


@pytest.mark.slow
def test_the_step_before_leads_to_the_same_losses(
    made: dict[str, str], damaged: Callable[[str, float], Path], world: Worlds, tmp_path: Path
) -> None:
    folder, whole = damaged("__0_0.distcp", 0.4), tmp_path / "whole"
    shutil.copytree(made["run"], whole)
    training = {"train_iters": 6}
    assert world(1).run(run_training, run_tree(made["data"], whole, training=training)) == [0]
    tree = run_tree(made["data"], folder, training=training, checkpoint={"ckpt_step": 2})
    assert world(1).run(run_training, tree) == [0]
    assert losses(folder) == losses(whole) and latest_iteration(folder) == 6
    assert not faults_in_blocks(read_manifest(folder / "iter_0000004" / "manifest.json")), "written anew"


def test_a_checkpoint_that_is_damaged_too_is_not_named(
    made: dict[str, str], damaged: Callable[[str, float], Path], world: Worlds
) -> None:
    folder = damaged("__0_0.distcp", 0.4)
    flip(folder / "iter_0000002" / "__0_1.distcp", 0.4)
    with pytest.raises(RankError, match="no whole checkpoint before it"):
        world(1).run(run_training, run_tree(made["data"], folder))


def test_files_that_the_manifest_does_not_name_are_refused(made: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(made["run"], tmp_path / "run")
    (tmp_path / "run" / "iter_0000004" / "__7_0.distcp").write_bytes(b"of another run")
    with pytest.raises(CorruptError, match="__7_0.distcp: manifest.json does not name it"):
        read_record(tmp_path / "run")
    assert read_record(tmp_path / "run", 2).iteration == 2


def test_ckpt_step_belongs_to_load_where_that_is_another_folder(made: dict[str, str], tmp_path: Path) -> None:
    def resumed(**checkpoint: Any) -> int | None:
        plan = check_run(make_config(make_tree(made["data"], checkpoint=checkpoint)), 1)
        return plan.resume.iteration if plan.resume else None

    run, new = made["run"], str(tmp_path / "new")
    assert resumed(save=run) == 4 and resumed(save=run, ckpt_step=2) == 2
    assert resumed(save=run, load=run, ckpt_step=2) == 2 and resumed(load=run, ckpt_step=2) == 2
    assert resumed(save=new, load=run, ckpt_step=2) == 2
    shutil.copytree(run, new)
    assert resumed(save=new, load=run, ckpt_step=2) == 4, "what was begun from step 2 of --load goes on"
    with pytest.raises(
        UsageError, match="iter_0000003 has no manifest.json.*iter_0000002, iter_0000004.*--ckpt-step N"
    ):
        resumed(save=run, ckpt_step=3)
    with pytest.raises(UsageError, match="of which folder"):
        resumed(ckpt_step=3)


def test_without_its_tracker_the_newest_finished_checkpoint_counts(made: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(made["run"], tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").unlink()
    (tmp_path / "run" / "iter_0000006.partial").mkdir()
    (tmp_path / "run" / "iter_0000008").mkdir()
    assert read_record(tmp_path / "run").iteration == 4
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff4")
    with pytest.raises(CorruptError, match="iter_0000002, iter_0000004"):
        read_record(tmp_path / "run")


def test_shares_hash_every_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "BLOCK_BYTES", 5)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 5)
    (tmp_path / "a").write_bytes(bytes(range(23)))
    (tmp_path / "b").write_bytes(b"x")
    files = [hash_file(tmp_path / name) for name in "ab"]
    written = write_manifest(tmp_path / "m.json", format="f", version=1, parameters={}, parents={}, files=files)
    for name, position, block in (("a", 0.0, 0), ("a", 0.6, 2), ("a", 1.0, 4), ("b", 0.0, 0)):
        flip(tmp_path / name, position)
        found = [fault for share in range(3) for fault in faults_in_blocks(written, share=share, num_shares=3)]
        assert len(found) == 1 and found[0].startswith(f"{name}: block {block} ")
        flip(tmp_path / name, position)


def test_verify_looks_at_every_checkpoint_of_a_run(
    made: dict[str, str], damaged: Callable[[str, float], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verify.main, [made["run"]]) == 0
    assert re.findall(r"iter_\d+: whole: megakd-checkpoint", capsys.readouterr().out) == [
        f"iter_000000{step}: whole: megakd-checkpoint" for step in (2, 4)
    ]
    folder = damaged("__0_0.distcp", 0.5)
    (folder / "iter_0000002" / "stray").touch()
    assert run(verify.main, [str(folder)]) == 5
    said = capsys.readouterr().err
    assert "iter_0000004: CORRUPT: __0_0.distcp: block 0" in said and "iter_0000002: CORRUPT: stray: the" in said

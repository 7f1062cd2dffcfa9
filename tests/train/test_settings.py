"""A run that goes on with other settings says so, with both values, and the configuration of every step is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import make_config, make_tree, output_of_training, run_training, write_dataset
from worlds import Worlds

from megakd.errors import MismatchError
from megakd.model.checkpoint.record import read_record
from megakd.train.preflight import check_run
from megakd.train.settings import changed_settings, keep_configuration, settings_of


def tree_of(folder: Path, **groups: dict[str, Any]) -> dict[str, Any]:
    base = {"training": {"train_iters": 2}, "checkpoint": {"save": str(folder / "run")}}
    return make_tree(str(folder / "data"), **{key: base.get(key, {}) | groups.get(key, {}) for key in base | groups})


@pytest.fixture(scope="module")
def folder(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data and a run of two steps."""
    made = tmp_path_factory.mktemp("settings")
    write_dataset(made / "data")
    write_dataset(made / "other", seed=1)
    assert world(1).run(run_training, tree_of(made)) == [0]
    return made


CHANGES: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "nothing": ({}, []),
    "a record of the same": ({"optim": {"lr_decay_iters": 2}}, []),
    "rate": ({"optim": {"lr": 1e-3}}, ["--lr: 0.003 there, 0.001 here"]),
    "adam": (
        {"optim": {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_eps": 1e-6, "weight_decay": 0.2, "clip_grad": 2.0}},
        [
            "--weight-decay: 0.1 there, 0.2 here", "--adam-beta1: 0.9 there, 0.8 here",
            "--adam-beta2: 0.95 there, 0.9 here", "--adam-eps: 1e-08 there, 1e-06 here",
            "--clip-grad: 1.0 there, 2.0 here",
        ],
    ),
    "style": (
        {"optim": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1, "min_lr": 1e-4, "lr_warmup_iters": 1}},
        [
            "--min-lr: 0.0 there, 0.0001 here", "--lr-decay-style: cosine there, WSD here",
            "--lr-warmup-iters: 0 there, 1 here", "--lr-wsd-decay-style: without effect there, minus_sqrt here",
            "--lr-wsd-decay-iters: without effect there, 1 here",
        ],
    ),
    "constant": (
        {"optim": {"lr_decay_style": "constant"}},
        [
            "--min-lr: 0.0 there, without effect here", "--lr-decay-style: cosine there, constant here",
            "--lr-decay-iters: 2 there, without effect here",
        ],
    ),
    "more steps": ({"training": {"train_iters": 4}}, ["--lr-decay-iters: 2 there, 4 here"]),
    "batches": (
        {"training": {"micro_batch_size": 4, "global_batch_size": 16}},
        ["--micro-batch-size: 2 there, 4 here", "--global-batch-size: 8 there, 16 here"],
    ),
    "loss": (
        {"objective": {"z_loss_coeff": 1e-4}, "data": {"eod_mask_loss": True}},
        ["--z-loss-coeff: 0.0 there, 0.0001 here", "--eod-mask-loss: False there, True here"],
    ),
    "model": ({"student": {"hidden_dropout": 0.1}}, ["--hidden-dropout: 0.0 there, 0.1 here"]),
    "layout and logs": (
        {"parallel": {"overlap_grad_reduce": True}, "logging": {"log_interval": 7}, "evaluate": {"eval_interval": 9}},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "beside"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_told(name: str, recorded: bool, folder: Path) -> None:
    """By the checkpoint's record, and by config.yaml for a checkpoint that is older than such records."""
    groups, expected = CHANGES[name]
    record = read_record(folder / "run")
    if not recorded:
        record = dataclasses.replace(record, settings=None)
    config = make_config(tree_of(folder, **groups))
    found = changed_settings(settings_of(config), check_run(config, 1).student, record)
    assert sorted(found) == sorted(
        f"this run goes on with other settings than {record.path}: {change}" for change in expected
    )


def test_what_is_not_known_is_said(folder: Path, tmp_path: Path) -> None:
    record = dataclasses.replace(read_record(folder / "run"), settings=None, path=tmp_path / "iter_0000002")
    config = make_config(tree_of(folder))
    (found,) = changed_settings(settings_of(config), check_run(config, 1).student, record)
    assert found.startswith(f"{record.path} does not tell what it was trained with")


@pytest.mark.slow
def test_a_run_that_goes_on_with_others(world: Worlds, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    save = tmp_path / "run"
    (first,) = world(1).run(output_of_training, tree_of(tmp_path))
    (same,) = world(1).run(output_of_training, tree_of(tmp_path, optim={"lr_decay_iters": 2}))  # has nothing to do
    more = {"training": {"train_iters": 3}, "optim": {"lr": 1e-3, "lr_decay_iters": 2}}
    (second,) = world(1).run(output_of_training, tree_of(tmp_path, **more))
    assert "Warning" not in first + same
    warnings = [line.split("Warning: ")[1] for line in second.splitlines() if "Warning" in line]
    assert warnings == [f"this run goes on with other settings than {save}/iter_0000002: --lr: 0.003 there, 0.001 here"]
    segments = {path.name: yaml.safe_load(path.read_text()) for path in (save / "configs").iterdir()}
    assert {name: tree["optim"]["lr"] for name, tree in segments.items()} == {
        "from_iter_0000001.yaml": 0.003,
        "from_iter_0000003.yaml": 0.001,
    }
    assert (save / "config.yaml").read_bytes() == (save / "configs" / "from_iter_0000003.yaml").read_bytes()
    settings = json.loads((save / "iter_0000003" / "manifest.json").read_text())["parameters"]["settings"]
    assert settings == settings_of(make_config(tree_of(tmp_path, **more))) and settings["lr"] == 1e-3


def test_configurations_of_steps_that_come_again_go(tmp_path: Path) -> None:
    for first_step, text in ((1, "a"), (5, "b"), (9, "b"), (12, "c"), (10_000_001, "d"), (7, "e")):
        keep_configuration(tmp_path, text, first_step=first_step)
    kept = {path.name: path.read_text() for path in (tmp_path / "configs").iterdir()}
    assert kept == {"from_iter_0000001.yaml": "a", "from_iter_0000005.yaml": "b", "from_iter_0000007.yaml": "e"}
    assert (tmp_path / "config.yaml").read_text() == "e"


def test_a_folder_of_an_older_version_keeps_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("old")
    keep_configuration(tmp_path, "new", first_step=3)
    kept = {path.name: path.read_text() for path in (tmp_path / "configs").iterdir()}
    assert kept == {"from_iter_0000001.yaml": "old", "from_iter_0000003.yaml": "new"}


def test_a_run_that_keeps_nothing_says_so(folder: Path, world: Worlds) -> None:
    tree = tree_of(folder)
    del tree["checkpoint"]
    (said,) = world(1).run(output_of_training, tree)
    assert "Warning: without --save DIR nothing of this run is kept" in said.splitlines()[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data_path": ["data", "other"]},
            r"--data-path was data \(\w{8}\), is now 0.5 data \(\w{8}\) \+ 0.5 other \(\w{8}\); use",
        ),
        ({"data_path": ["other"]}, r"--data-path was data \(\w{8}\), is now other \(\w{8}\)"),
        ({"seq_length": 8}, r"--seq-length was 16, is now 8;"),
        (
            {"packing": "document", "seq_length": 64},
            r"--seq-length was 16, is now 64, --packing or --selection was \['concat'\], is now \['document'\];",
        ),
    ],
    ids=["another dataset more", "another", "length", "packing"],
)
def test_another_blend_names_datasets_and_the_way_out(change: dict[str, Any], message: str, folder: Path) -> None:
    tree = tree_of(folder)
    data = {**change, "data_path": [str(folder / name) for name in change.get("data_path", ["data"])]}
    tree["data"] |= data
    with pytest.raises(MismatchError, match=message) as error:
        check_run(make_config(tree), 1)
    text = str(error.value)
    assert text.startswith(f"{folder}/run/iter_0000002: cannot continue the data order: ")
    assert text.endswith(f"start from the weights alone: --load {folder}/run --finetune, with another --save")

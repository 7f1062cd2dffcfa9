"""Refusals of a logits store: before anything starts, and, where a record is damaged, on every rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from captured import GHOST, LAYOUTS, capture, make_stores, stored
from runs import VOCAB, make_config, run_training
from worlds import Worlds

from megakd.__main__ import run
from megakd.logits.spec import shard_path
from megakd.train import main as train_main
from megakd.train.preflight import check_run


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_stores(world, tmp_path_factory.mktemp("stores"), ("whole", "sparse", "counts", "drawn"))


@pytest.mark.parametrize("divergence", ["reverse_kl", "generalised_jsd", "total_variation"])
@pytest.mark.parametrize("name", ["counts", "drawn"])
def test_samples_are_not_for_every_divergence(
    name: str, divergence: str, setting: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tree = stored(setting, name, objective={"kd_divergence": divergence})
    assert status(tree, tmp_path) == 2
    assert "linear in the teacher's probabilities" in capsys.readouterr().err


def status(tree: dict[str, Any], folder: Path) -> int:
    """Exit status of ``megakd train`` in this process, which must not get as far as a model."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return run(train_main.main, ["--config", str(path)])


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "another dataset": ({"data": "other"}, ("whole",), 4, "a store of dataset"),
    "another length": ({"data": {"seq_length": 8}}, ("whole",), 4, "a store of seq_length 16, expected 8"),
    "another packing": ({"data": {"packing": "document", "seq_length": 64}}, ("whole",), 4, "packing concat, expected"),
    "two for one": ({}, ("whole", "whole"), 2, "--logits-load-dir has 2 entries for 1 datasets"),
    "not there": ({}, ("nowhere",), 2, "no manifest here"),
    "a file": ({}, (__file__,), 2, "--logits-load-dir: "),
    "unfinished": ({}, (str(Path(__file__).parent),), 2, "'megakd capture' or 'megakd collect' has finished"),
    "none at all": ({}, ("none",), 2, "names 'none' for every dataset"),
    "reverse KL without a tail": ({"objective": {"kd_divergence": "reverse_kl"}}, ("whole",), 2, "expected ghost"),
    "taid": ({"objective": {"kd_divergence": "taid"}}, ("whole",), 2, "divergence taid on top_p_k targets"),
    "temperature": ({"objective": {"kd_temperature": 2.0, **GHOST}}, ("whole",), 2, "use temperature 1, or top_p_k"),
    "schedule": (
        {"objective": {"kd_temperature_schedule": "cosine", "kd_temperature_min": 0.5, **GHOST}}, ("whole",), 2,
        "--kd-temperature-schedule cosine on top_p_k targets with --kd-tail ghost",
    ),
    "schedule of counts": (
        {"objective": {"kd_temperature_schedule": "cosine", "kd_temperature_min": 0.5}}, ("counts",), 2,
        "--kd-temperature-schedule cosine on samples targets",
    ),
    "mode": (
        {"objective": {"kd_temperature_mode": "entropy", "kd_temperature_on": "teacher"}}, ("whole",), 2, "use static"
    ),
    "rho": ({"objective": {"rho_keep": 0.5}}, ("whole",), 2, "add --teacher-load DIR; logits stores do not tell"),
    "alpha 0": ({"objective": {"kd_alpha": 0.0}}, ("whole",), 2, "drop --logits-load-dir"),
    "threads": ({"teacher": {"logits_load_decode_threads": 0}}, ("whole",), 2, "--logits-load-decode-threads is 0"),
    "held-out store without data": (
        {"teacher": {"valid_logits_load_dir": ["x"]}}, ("whole",), 2, "--valid-logits-load-dir is for held-out data"
    ),
    "kinds": (
        {"data": {"data_path": ["data", "data"]}}, ("whole", "counts"), 2, "takes stores of one kind"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, setting: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    groups, stores, expected, message = REFUSED[name]
    if groups.get("data") == "other":
        groups = {"data": {"data_path": [setting["other"]]}}
    elif "data_path" in groups.get("data", {}):
        groups = {"data": {"data_path": [setting["data"]] * 2}}
    assert status(stored(setting, *stores, **groups), tmp_path) == expected
    assert message in capsys.readouterr().err


def test_a_store_of_another_tokenizer(
    setting: dict[str, str], world: Worlds, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = {"tokenizer": {"type": "NullTokenizer", "hash": "1" * 32, "vocab_size": VOCAB, "eod": VOCAB - 1}}
    world(1).run(capture, setting["data"], setting["teacher"], str(tmp_path / "foreign"), spec)
    assert status(stored(setting, str(tmp_path / "foreign")), tmp_path) == 4
    assert "different tokenizers: the data has NullTokenizer 0000" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("damage", "message"), [(cut, "bytes on disk"), (Path.unlink, "missing")])
def test_a_cut_or_missing_shard(
    damage: Callable[[Path], None], message: str, setting: dict[str, str], capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(setting["sparse"], tmp_path / "store")
    damage(shard_path(tmp_path / "store", 1).with_suffix(".rows"))
    assert status(stored(setting, str(tmp_path / "store"), objective=GHOST), tmp_path) == 5
    assert message in capsys.readouterr().err


def flip_records(store: Path) -> None:
    """A byte in every record but those of the first ten samples."""
    for shard in range(4):
        path = shard_path(store, shard)
        index = np.fromfile(path.with_suffix(".index"), "<u8", 100)
        damaged = bytearray(path.with_suffix(".rows").read_bytes())
        for offset in index[10 if shard == 0 else 0 :].tolist():
            if offset + 20 < len(damaged):
                damaged[offset + 20] ^= 4
        path.with_suffix(".rows").write_bytes(damaged)


def error_of_training(tree: dict[str, Any]) -> tuple[str, int, str]:
    """End of a run on this rank: the error's class, its exit status, its words."""
    try:
        run_training(tree)
    except ValueError as error:
        return type(error).__name__, int(error.status), str(error)  # type: ignore[attr-defined]
    return "", 0, ""


@pytest.mark.parametrize("name", ["whole", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)])
def test_a_flipped_byte_ends_the_run_on_every_rank(
    name: str, setting: dict[str, str], world: Worlds, tmp_path: Path
) -> None:
    """The step in which it is read is not applied, and all ranks say why."""
    shutil.copytree(setting["sparse"], tmp_path / "store")
    flip_records(tmp_path / "store")
    size, parallel = LAYOUTS.get(name, (1, {}))
    tree = stored(setting, str(tmp_path / "store"), objective=GHOST, parallel=parallel)
    found = world(size).run(error_of_training, tree)
    assert len(found) == size
    for error, code, text in found:
        assert (error, code) == ("CorruptError", 5)
        assert text.startswith("step 1, rank ") and "is not what was written" in text
        assert text.endswith("the step was not applied")


def one_rank_cannot_read(tree: dict[str, Any]) -> tuple[str, int, str]:
    """Train with a damaged copy of the store on rank 1, as on a cluster where one node's copy is damaged."""
    if os.environ["RANK"] == "1":
        tree["teacher"]["logits_load_dir"] = [tree["teacher"]["logits_load_dir"][0] + "-damaged"]
    return error_of_training(tree)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fault_of_one_rank_ends_the_run_on_every_rank(
    name: str, setting: dict[str, str], world: Worlds, tmp_path: Path
) -> None:
    shutil.copytree(setting["sparse"], tmp_path / "store")
    shutil.copytree(setting["sparse"], tmp_path / "store-damaged")
    flip_records(tmp_path / "store-damaged")
    size, parallel = LAYOUTS[name]
    tree = stored(setting, str(tmp_path / "store"), objective=GHOST, parallel=parallel)
    found = world(size).run(one_rank_cannot_read, tree)
    assert [(error, code) for error, code, _ in found] == [("CorruptError", 5)] * 2
    assert all("store-damaged" in text for _, _, text in found)


def shards_are_removed(tree: dict[str, Any]) -> tuple[str, int, str]:
    """Train while the store's shards are removed, as by somebody who tidies up or by a failing disk."""
    from megakd.train.loop import train

    config = make_config(tree)
    plan = check_run(config, int(os.environ["WORLD_SIZE"]))
    shutil.rmtree(Path(tree["teacher"]["logits_load_dir"][0]) / "shards", ignore_errors=True)
    try:
        train(config, plan)
    except ValueError as error:
        return type(error).__name__, int(error.status), str(error)  # type: ignore[attr-defined]
    return "", 0, ""


def test_a_shard_that_is_gone_while_training(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    shutil.copytree(setting["sparse"], tmp_path / "store")
    tree = stored(setting, str(tmp_path / "store"), objective=GHOST)
    ((error, code, text),) = world(1).run(shards_are_removed, tree)
    assert (error, code) == ("CorruptError", 5), text
    assert "stored targets cannot be read" in text and "shards" in text and text.endswith("the step was not applied")


@pytest.mark.slow
def test_a_damaged_held_out_store_costs_no_training(setting: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    shutil.copytree(setting["sparse"], tmp_path / "store")
    flip_records(tmp_path / "store")
    groups: dict[str, Any] = {
        "teacher": {"valid_logits_load_dir": [str(tmp_path / "store")]},
        "data": {"valid_data_path": [setting["data"]]},
        "checkpoint": {"save": str(tmp_path / "run"), "save_interval": 1000},
        "training": {"train_iters": 2},
    }
    ((error, code, text),) = world(1).run(error_of_training, stored(setting, "sparse", objective=GHOST, **groups))
    assert (error, code) == ("CorruptError", 5)
    assert text.startswith("step 2, rank 0: ") and text.endswith("the evaluation has no result")
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"

"""What a run keeps of its own model: the rows that `capture` would read, in any layout, and after a kill the same."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forked import ForkedVerb
from runs import losses, make_config, make_tree, one_step, run_training, write_dataset
from worlds import Worlds

from megakd.config.tree import from_dict
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.loader import Loader
from megakd.data.samples.concat import ConcatSamples
from megakd.errors import MismatchError, UsageError
from megakd.logits.store import BatchRows, LogitsStore, verify_store
from megakd.pipeline.capture.collect_main import main as collect
from megakd.pipeline.capture.preflight import CaptureConfig, check_capture
from megakd.train.preflight import check_run

SEQ, SAMPLES, STEPS = 16, 118, 20  # 160 samples of 118: some are met twice
KINDS: dict[str, dict[str, Any]] = {
    "top_p_k": {"top_k": 20, "top_p": 0.15, "value_bits": "32"},
    "samples": {"kind": "samples", "draws": 50},
}
FROZEN = {"lr": 1e-30}  # no weight of fp32 moves


def tree_of(data: str, save: Path, kind: str = "top_p_k", **groups: dict[str, Any]) -> dict[str, Any]:
    groups["training"] = {"train_iters": STEPS, **groups.get("training", {})}
    groups["logits_save"] = {"dir": str(save / "logits"), **KINDS[kind], **groups.get("logits_save", {})}
    return make_tree(data, checkpoint={"save": str(save), "save_interval": 8}, **groups)


def store_of(data: str, save: Path, kind: str = "top_p_k", *flags: str) -> Path:
    argv = ["--journal", str(save / "logits"), "--data-path", data, "--output", str(save / "store")]
    argv += ["--value-bits", "32", "--shard-samples", "13", *flags]
    assert collect(argv) == 0
    return save / "store"


def content(store: Path) -> dict[str, bytes]:
    """All but the manifests, which name the journal and its segments."""
    return {path.name: path.read_bytes() for path in sorted(store.rglob("*.*")) if path.suffix != ".json"}


def rows_of(data: str, store: Path) -> BatchRows:
    inputs = ConcatSamples(IndexedDataset(data), SEQ).read(np.arange(SAMPLES))[:, :-1]
    return LogitsStore(store).read_batch(np.arange(SAMPLES), inputs)


def run_capture(tree: dict[str, Any]) -> int:
    from megakd.pipeline.capture.run import capture

    config = from_dict(CaptureConfig, tree)
    return int(capture(config, check_capture(config, int(os.environ["WORLD_SIZE"]))))


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of each kind whose weights stay as they are, and what `capture` reads from its checkpoint."""
    folder = tmp_path_factory.mktemp("journal")
    data = write_dataset(folder / "data", num_tokens=1900)
    for kind, rows in KINDS.items():
        assert world(1).run(run_training, tree_of(data, folder / kind, kind, optim=FROZEN)) == [0]
        store_of(data, folder / kind)
        base = {"load": str(folder / kind), "data_path": data, "seq_length": SEQ, "shard_samples": 13, "bf16": False}
        assert world(1).run(run_capture, {**base, **rows, "output": str(folder / f"{kind} captured")}) == [0]
    return {"folder": folder, "data": data}


def assert_alike(found: BatchRows, expected: BatchRows) -> None:
    """fp32 in another order of sums: the same ids but where a prefix just reaches its mass."""
    assert (found.has_targets_BS == expected.has_targets_BS).all()
    assert np.abs(found.entropy_BS - expected.entropy_BS).max() < 1e-3
    width = max(found.ids_BSK.shape[-1], expected.ids_BSK.shape[-1])
    ids, log_probs = zip(*(_padded(rows, width) for rows in (found, expected)))
    same = (ids[0] == ids[1]).all(-1)
    assert same.mean() > 0.99
    listed = np.isfinite(log_probs[1]) & same[..., None]
    assert np.abs(log_probs[0][listed] - log_probs[1][listed]).max() < 1e-4


def _padded(rows: BatchRows, width: int) -> tuple[np.ndarray, np.ndarray]:
    more = ((0, 0), (0, 0), (0, width - rows.ids_BSK.shape[-1]))
    return np.pad(rows.ids_BSK, more), np.pad(rows.log_probs_BSK, more, constant_values=-np.inf)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_capture(kind: str, made: dict[str, Any]) -> None:
    store = made["folder"] / kind / "store"
    found, expected = rows_of(made["data"], store), rows_of(made["data"], made["folder"] / f"{kind} captured")
    assert found.has_targets_BS.all()
    assert_alike(found, expected)
    assert verify_store(store) == []
    details = LogitsStore(store).spec.details
    assert details["online"] and details["last_step"] == STEPS


@pytest.mark.slow
def test_the_last_step_of_each_sample(made: dict[str, Any]) -> None:
    config = make_config(tree_of(made["data"], made["folder"] / "nowhere"))
    plan = check_run(config, 1)
    expected = np.full(SAMPLES, -1)
    batches = Loader(plan.blend, seq_length=SEQ, micro_batch_size=2, global_batch_size=8)
    for step in range(1, STEPS + 1):
        expected[next(batches).draws.sample_id] = step
    steps = np.fromfile(made["folder"] / "top_p_k" / "store" / "steps.i32", "<i4")
    np.testing.assert_array_equal(steps, expected)
    assert (steps >= 1).all() and (steps <= 14).any() and (steps == STEPS).any()


@pytest.mark.slow
def test_only_late_steps_for_a_student(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    steps = np.fromfile(made["folder"] / "top_p_k" / "store" / "steps.i32", "<i4")
    shutil.copytree(made["folder"] / "top_p_k" / "logits", tmp_path / "logits")
    store = store_of(made["data"], tmp_path, "top_p_k", "--from-step", "13")  # inside the steps of one checkpoint
    late = np.fromfile(store / "steps.i32", "<i4")
    np.testing.assert_array_equal(late, np.where(steps >= 13, steps, -1))
    opened = LogitsStore(store)
    assert [opened.has_targets(sample) for sample in range(SAMPLES)] == (late >= 0).tolist()
    reads = make_tree(made["data"], teacher={"logits_load_dir": [str(store)]}, objective={"kd_tail": "ghost"})
    first = next(
        Loader(check_run(make_config(reads), 1).blend, seq_length=SEQ, micro_batch_size=2, global_batch_size=8)
    )
    (told,) = world(1).run(one_step, reads)
    assert told["stored_share"] == (late[first.draws.sample_id] >= 0).mean() and 0 < told["stored_share"] < 1


@pytest.mark.slow
def test_data_parallel_ranks_change_no_byte(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    tree = tree_of(made["data"], tmp_path, optim=FROZEN)
    assert world(2).run(run_training, tree) == [0, 0]
    assert content(store_of(made["data"], tmp_path)) == content(made["folder"] / "top_p_k" / "store")


LAYOUTS: dict[str, dict[str, Any]] = {
    "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, kind: str, made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    tree = tree_of(made["data"], tmp_path, kind, optim=FROZEN, parallel=LAYOUTS[layout])
    assert world(2).run(run_training, tree) == [0, 0]
    store = store_of(made["data"], tmp_path)
    assert_alike(rows_of(made["data"], store), rows_of(made["data"], made["folder"] / kind / "store"))
    steps = "steps.i32"
    assert (store / steps).read_bytes() == (made["folder"] / kind / "store" / steps).read_bytes()


@pytest.mark.slow
def test_what_is_behind_the_checkpoint_comes_again(world: Worlds, tmp_path: Path) -> None:
    """As after a kill between the rows' commit and the checkpoint's, and with what a dead rank left."""
    data = write_dataset(tmp_path / "data", num_tokens=1900)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert world(1).run(run_training, tree_of(data, whole)) == [0]
    shutil.copytree(whole, cut)
    (cut / "latest_checkpointed_iteration.txt").write_text("8\n")
    (journal,) = (cut / "logits").iterdir()
    segment = next((journal / "segments").glob("00000017-*.rows"))
    segment.write_bytes(segment.read_bytes()[:-9])
    (journal / "segments" / "00000009-r00007-0000.rows.tmp").write_bytes(b"left")
    tree = tree_of(data, cut)
    tree["checkpoint"]["save_interval"] = 5
    assert world(1).run(run_training, tree) == [0]
    first_last = [f"{first:08d}-{last:08d}.json" for first, last in ((1, 8), (9, 10), (11, 15), (16, 20))]
    assert sorted(path.name for path in journal.glob("*.json")) == first_last
    segments = {path.name.split(".")[0] for path in (journal / "segments").iterdir()}
    assert segments == {f"{first:08d}-r00000-0000" for first in (1, 9, 11, 16)}, "nothing is left of what was cut"
    assert content(store_of(data, cut)) == content(store_of(data, whole))
    assert losses(cut) == losses(whole) == losses_without(world, data, tmp_path / "without"), "keeping changes no bit"


def losses_without(world: Worlds, data: str, save: Path) -> dict[int, tuple[float, float]]:
    tree = tree_of(data, save)
    del tree["logits_save"]
    assert world(1).run(run_training, tree) == [0]
    return losses(save)


@pytest.mark.slow
def test_after_a_kill_the_same_store(world: Worlds, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", num_tokens=1900)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert world(1).run(run_training, tree_of(data, whole)) == [0]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree_of(data, cut)))
    run = ForkedVerb(["train", "--config", str(tmp_path / "run.yaml")])
    deadline = time.monotonic() + 200
    while not (cut / "metrics.jsonl").exists() or len((cut / "metrics.jsonl").read_text().splitlines()) < 11:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    run.kill()
    run.communicate(timeout=200)
    assert 20 not in losses(cut), "the kill came too late to test anything"
    assert world(1).run(run_training, tree_of(data, cut)) == [0]
    assert content(store_of(data, cut)) == content(store_of(data, whole))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"top_k": 21}, {"value_bits": "16"}, {"kind": "samples"}])
def test_a_journal_of_other_rows_is_refused(change: dict[str, Any], made: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="another --logits-save-dir"):
        check_run(make_config(tree_of(made["data"], made["folder"] / "top_p_k", logits_save=change)), 1)


@pytest.mark.slow
def test_a_journal_of_another_run_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    other = {"dir": str(made["folder"] / "top_p_k" / "logits")}
    with pytest.raises(MismatchError, match="run"):
        check_run(make_config(tree_of(made["data"], tmp_path, logits_save=other)), 1)
    shutil.copytree(made["folder"] / "top_p_k", tmp_path / "moved")
    check_run(make_config(tree_of(made["data"], tmp_path / "moved")), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [{"top_k": 0}, {"top_p": 1.5}, {"draws": 3}, {"from_step": 0}, {"top_k": 252}, {"kind": "samples", "draws": 0}],
)
def test_usage(wrong: dict[str, Any], made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        check_run(make_config(tree_of(made["data"], tmp_path, logits_save=wrong)), 1)


@pytest.mark.slow
def test_a_folder_that_cannot_be_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    tree = tree_of(made["data"], tmp_path, logits_save={"dir": f"{made['data']}.bin/logits"})
    with pytest.raises(UsageError, match="a file is there"):
        check_run(make_config(tree), 1)


@pytest.mark.slow
def test_rows_need_checkpoints(made: dict[str, Any], tmp_path: Path) -> None:
    tree = tree_of(made["data"], tmp_path)
    tree["checkpoint"]["save"] = None
    with pytest.raises(UsageError, match="--save"):
        check_run(make_config(tree), 1)


@pytest.mark.slow
def test_rows_of_a_branch_that_was_left_do_not_count(
    world: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes back to step 2, goes on without keeping rows, then keeps them again: those of 3 and 4 are of weights
    that no checkpoint of it ever had. Before it is told, 'collect' goes by what the newest checkpoint names."""
    data, save = write_dataset(tmp_path / "data", num_tokens=1900), tmp_path / "run"

    def run(steps: int, **logits_save: Any) -> None:
        tree = tree_of(data, save, training={"train_iters": steps}, logits_save=logits_save)
        tree["checkpoint"]["save_interval"] = 2
        assert world(1).run(run_training, tree) == [0]

    run(4)
    (journal,) = (save / "logits").iterdir()
    (save / "latest_checkpointed_iteration.txt").write_text("2\n")
    steps_of_two = np.fromfile(store_of(data, save) / "steps.i32", "<i4")
    assert set(steps_of_two.tolist()) == {-1, 1, 2}
    assert "00000003-00000004 are left out" in capsys.readouterr().err
    run(4, dir=None)
    run(6)
    assert sorted(path.name for path in journal.glob("*.json")) == ["00000001-00000002.json", "00000005-00000006.json"]
    shutil.rmtree(save / "store")
    assert set(np.fromfile(store_of(data, save) / "steps.i32", "<i4").tolist()) == {-1, 1, 2, 5, 6}


def train_with_a_bad_sample(tree: dict[str, Any]) -> int:
    from megakd.train import journal

    whole = journal.finite_samples

    def first_is_bad(reading: Any, batch: int) -> Any:
        return whole(reading, batch) & (np.arange(batch) > 0)

    journal.finite_samples = first_is_bad
    try:
        return run_training(tree)
    finally:
        journal.finite_samples = whole


def test_samples_without_rows_are_counted(world: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data", num_tokens=1900)
    tree = tree_of(data, tmp_path, training={"train_iters": 2})
    assert world(1).run(train_with_a_bad_sample, tree) == [0]
    ((manifest,),) = ([*folder.glob("*.json")] for folder in (tmp_path / "logits").iterdir())
    parameters = json.loads(manifest.read_text())["parameters"]
    assert (parameters["left_out"], parameters["num_records"]) == (8, 8)  # one of each microbatch of two
    store_of(data, tmp_path)
    assert "met 8 times with logits that are not finite" in capsys.readouterr().err

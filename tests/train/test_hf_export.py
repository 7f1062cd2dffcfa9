"""Exports beside checkpoints: which are made and when, failures and stops, and a whole run with background saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model.huggingface.folders import Case, write_folder
from runs import make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.errors import MismatchError, UsageError
from megakd.model.checkpoint.record import read_record
from megakd.model.checkpoint.tensor_reader import TensorReader
from megakd.model.huggingface.export import export
from megakd.model.huggingface.export_plan import plan_export
from megakd.train import hf_export
from megakd.train.config import CheckpointConfig
from megakd.train.hf_export import HfExporter
from megakd.train.preflight import check_run


class Process:
    """A process that ends when the test says so."""

    started: list[Process] = []  # noqa: RUF012

    def __init__(self, arguments: list[str], *, stdout: Any, **_more: Any) -> None:
        self.job, self.returncode, self._log = json.loads(arguments[-1]), None, stdout
        self.started.append(self)

    def end(self, status: int = 0, text: bytes = b"") -> None:
        self._log.write(text)
        self.returncode: int | None = status
        if status == 0:
            Path(self.job["save"]).mkdir()
            (Path(self.job["save"]) / "export.json").touch()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        if self.returncode is None:
            self.end()
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    monkeypatch.setattr(hf_export.subprocess, "Popen", Process)
    Process.started = []
    return Process.started


def exporter(save: Path, said: list[str], *, is_first: bool = True, interval: int = 10) -> HfExporter:
    checkpoint = CheckpointConfig(save=str(save), save_interval=5, hf_export_interval=interval)
    return HfExporter(checkpoint, options={}, last_step=45, is_first=is_first, say=said.append)


def checkpoint(save: Path, step: int) -> Path:
    path = save / f"iter_{step:07d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").touch()
    return path


def test_one_at_a_time_of_the_steps_that_are_due(tmp_path: Path, started: list[Process]) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, said)
    for step in (5, 10, 20, 45):
        exports.saved(checkpoint(tmp_path, step))
    assert [process.job["load"] for process in started] == [str(tmp_path / "iter_0000010")]
    exports.poll()
    assert len(started) == 1 and not said
    started[0].end()
    exports.poll()
    assert said == [f"exported {tmp_path / 'iter_0000010'} to {tmp_path / 'hf' / 'iter_0000010'}"]
    exports.finish(stopped=False)
    assert [Path(process.job["save"]).name[-2:] for process in started] == ["10", "20", "45"]
    assert said[1].startswith("waiting for the export of") and said[1].endswith("(1 more)")
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.log")) == []


def test_other_ranks_and_runs_without_the_flag_export_nothing(tmp_path: Path, started: list[Process]) -> None:
    said: list[str] = []
    for exports in (
        exporter(tmp_path, said, is_first=False),
        HfExporter(CheckpointConfig(save=str(tmp_path)), options={}, last_step=45, is_first=True, say=said.append),
    ):
        exports.saved(checkpoint(tmp_path, 10))
        exports.finish(stopped=False)
    assert not started and not said


def test_a_stopped_run_leaves_the_rest_to_the_next(tmp_path: Path, started: list[Process]) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, said)
    for step in (10, 20, 30):
        exports.saved(checkpoint(tmp_path, step))
    started[0].end()
    exports.poll()
    exports.finish(stopped=True)
    assert started[1].returncode == -9 and len(started) == 2
    assert said[-1] == f"the export of {tmp_path / 'iter_0000020'} is unfinished; the same command goes on with it"
    exporter(tmp_path, said).finish(stopped=False)
    assert [Path(process.job["save"]).name[-2:] for process in started[2:]] == ["20", "30"]


def test_a_failure_is_told_with_its_reason_and_a_way_to_repeat_it(tmp_path: Path, started: list[Process]) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, said)
    exports.saved(checkpoint(tmp_path, 10))
    started[0].end(6, b"some progress\nno space left\n")
    exports.poll()
    assert "iter_0000010 failed: no space left" in said[0] and "megakd convert --load" in said[0]
    assert (tmp_path / "hf" / "iter_0000010.log").read_text().startswith("some progress")


def test_flags_that_cannot_work(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data")

    def refused(match: str, error: type[Exception] = UsageError, /, **groups: Any) -> None:
        with pytest.raises(error, match=match):
            check_run(make_config(make_tree(data, **groups)), 1)

    save = {"save": str(tmp_path / "run"), "save_interval": 4}
    refused("without --hf-export-interval", checkpoint={"hf_export_dir": "x"})
    refused("add --save", checkpoint={"hf_export_interval": 4})
    refused("6 is not a multiple of --save-interval 4", checkpoint={**save, "hf_export_interval": 6})
    refused("expected at least 1", checkpoint={**save, "hf_export_interval": 0})
    both = {"add_qkv_bias": True, "qk_layernorm": True}
    refused(
        "the student: .*add_qkv_bias is True, qk_layernorm is True", MismatchError,
        checkpoint={**save, "hf_export_interval": 4}, student=both,
    )  # fmt: skip
    half = {"rotary_percent": 0.5}
    refused(
        "rotary_percent is 0.5", MismatchError, checkpoint={**save, "hf_export_interval": 4}, student=half
    )  # fmt: skip


@pytest.mark.slow
def test_what_a_folder_said_outlives_the_training_of_its_weights(tmp_path: Path, world: Worlds) -> None:
    """From checkpoint to checkpoint, and into the export: family, ids, longest sequence and rows of the vocabulary."""
    theirs, save = tmp_path / "theirs", tmp_path / "run"
    write_folder(theirs, Case("qwen3", 5, {"vocab_size": 259, "head_dim": 6}))
    (theirs / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    checkpoint = {"load": str(theirs), "finetune": True, "save": str(save), "save_interval": 1}
    tree = make_tree(write_dataset(tmp_path / "data"), training={"train_iters": 1}, checkpoint=checkpoint)
    tree["student"] = {}
    for steps in (1, 2):  # the second one goes on from the checkpoint of the first
        tree["training"]["train_iters"] = steps
        assert world(1).run(run_training, tree) == [0]
        record = read_record(save)
        assert record.iteration == steps and record.huggingface == read_record(theirs).huggingface
    export(plan_export(record), tmp_path / "hf", max_shard_bytes=10**9)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "hf"))
    kept = ("model_type", "bos_token_id", "eos_token_id", "max_position_embeddings", "vocab_size", "initializer_range")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert after["max_position_embeddings"] == 64 and after["vocab_size"] == 259
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"do_sample": True, "temperature": 0.7}


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_background_saves_exports_what_it_saved(tmp_path: Path, world: Worlds) -> None:
    from safetensors.torch import load_file

    save = tmp_path / "run"
    tree = make_tree(
        write_dataset(tmp_path / "data"),
        training={"train_iters": 6},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"save": str(save), "save_interval": 2, "hf_export_interval": 4, "async_save": True},
    )
    assert world(2).run(run_training, tree) == [0, 0]

    def check() -> None:
        assert sorted(path.name for path in (save / "hf").iterdir()) == ["iter_0000004", "iter_0000006"]
        for step in (4, 6):
            tensors = load_file(save / "hf" / f"iter_{step:07d}" / "model.safetensors")
            reader = TensorReader(read_record(save, step))
            down = reader.read("decoder.layers.mlp.linear_fc2.weight", 3)
            assert torch.equal(tensors["model.layers.3.mlp.down_proj.weight"], down)
            assert torch.equal(tensors["lm_head.weight"], reader.read("output_layer.weight")[:251])

    check()
    shutil.rmtree(save / "hf" / "iter_0000004")
    assert world(2).run(run_training, tree) == [0, 0]  # nothing is left to train, and one export to make
    check()

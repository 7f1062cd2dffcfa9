"""Checkpoints that Megatron-LM or plain megatron-core wrote: the model that ours is with these weights, or refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from foreign import args_of, own_weights, plain_weights, write_foreign
from runs import make_config, make_tree, one_step, run_training, write_dataset
from worlds import Worlds

from megakd.__main__ import run
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.model.checkpoint.megatron_args import model_of_args
from megakd.model.checkpoint.plain_pickle import Named, read_torch_file
from megakd.model.checkpoint.record import read_record
from megakd.pipeline.datasets import verify
from megakd.train.preflight import check_run

pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest")

SHAPE = {"num_query_groups": 2, "norm_epsilon": 1e-5, "rotary_base": 5000.0, "kv_channels": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("foreign")
    data, own = write_dataset(folder / "data"), folder / "run"
    tree = make_tree(data, student=SHAPE, training={"train_iters": 2}, checkpoint={"save": str(own)})
    assert world(1).run(run_training, tree) == [0]
    world(1).run(write_foreign, str(own), str(folder))
    model = folder / "model.yaml"
    model.write_text(yaml.safe_dump(tree["student"]))
    return {"data": data, "run": str(own), "folder": str(folder), "model": str(model)}


def teacher(made: dict[str, str], name: str, **more: Any) -> dict[str, Any]:
    told = {} if name in ("run", "mlm") else {"model_config": made["model"]}
    return {"load": f"{made['folder']}/{name}", **told, **more}


@pytest.mark.slow
def test_teachers_have_the_loss_of_ours(made: dict[str, str], world: Worlds) -> None:
    own = world(1).run(one_step, make_tree(made["data"], teacher=teacher(made, "run")), True)
    for name in ("mlm", "plain", "prefixed", "apart"):
        assert world(1).run(one_step, make_tree(made["data"], teacher=teacher(made, name)), True) == own, name


@pytest.mark.slow
def test_teacher_in_another_layout(made: dict[str, str], world: Worlds) -> None:
    own = world(1).run(one_step, make_tree(made["data"], teacher=teacher(made, "run")), True)
    for name, layout in (("mlm", "tensor_model_parallel_size"), ("apart", "pipeline_model_parallel_size")):
        tree = make_tree(made["data"], teacher=teacher(made, name), parallel={layout: 2})
        assert world(2).run(one_step, tree, True)[-1]["kd"] == pytest.approx(own[0]["kd"], rel=1e-5)


def test_finetune_starts_from_the_same_weights(made: dict[str, str], world: Worlds) -> None:
    def step(load: str) -> Any:
        tree = make_tree(made["data"], student=SHAPE, checkpoint={"load": load, "finetune": True})
        return world(1).run(one_step, tree)

    own = step(made["run"])
    assert step(f"{made['folder']}/mlm") == own and step(f"{made['folder']}/prefixed") == own


@pytest.mark.slow
def test_plain_megatron_core_reads_ours(made: dict[str, str], world: Worlds) -> None:
    assert world(1).run(plain_weights, made["run"]) == world(1).run(own_weights, made["run"])


def test_the_vocabulary_is_the_datas(made: dict[str, str], world: Worlds) -> None:
    record = read_record(f"{made['folder']}/mlm")
    assert record.iteration == 7 and record.rows == 252 and record.of_vocabulary(251).vocab_size == 251
    with pytest.raises(MismatchError, match="embedding of 252 rows, the vocabulary of the data is 253"):
        record.of_vocabulary(253)


def test_runs_cannot_be_continued_from_it(made: dict[str, str]) -> None:
    tree = make_tree(made["data"], student=SHAPE, checkpoint={"load": f"{made['folder']}/mlm"})
    with pytest.raises(MismatchError, match="--load .*mlm --finetune, and another --save"):
        check_run(make_config(tree), 1)


def test_a_model_that_nothing_tells_or_that_is_another(made: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not tell its model.*--teacher-model-config"):
        check_run(make_config(make_tree(made["data"], teacher={"load": f"{made['folder']}/plain"})), 1)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"student": make_tree("", student={**SHAPE, "rotary_base": 7.0})["student"]}))
    for name in ("mlm", "run"):
        tree = make_tree(made["data"], teacher={"load": f"{made['folder']}/{name}", "model_config": str(other)})
        with pytest.raises(MismatchError, match=r"rotary_base: 5000.0 there, 7.0 here"):
            check_run(make_config(tree), 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalization", "LayerNorm"), ("add_bias_linear", True), ("swiglu", False), ("window_size", (4, 0)),
     ("position_embedding_type", "learned_absolute"), ("multi_latent_attention", True), ("softmax_type", "learnable")],
)  # fmt: skip
def test_other_models_are_refused_by_their_fields(made: dict[str, str], field: str, value: Any) -> None:
    args = args_of(read_record(made["run"])) | {field: value}
    with pytest.raises(MismatchError, match=f"{field} is .*, expected"):
        model_of_args(args, {}, role="teacher")


def test_the_older_way_to_ask_for_rotary_positions(made: dict[str, str]) -> None:
    args = args_of(read_record(made["run"])) | {"position_embedding_type": "learned_absolute"}
    model_of_args(args | {"use_rotary_position_embeddings": True}, {}, role="teacher")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/megakd-hostile-common-ran",)


def test_pickles_run_nothing(made: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    proof = Path("/tmp/megakd-hostile-common-ran")
    proof.unlink(missing_ok=True)
    shutil.copytree(f"{made['folder']}/plain", tmp_path / "plain")
    torch.save({"args": Hostile(), "numbers": torch.ones(3), "iteration": 5}, tmp_path / "plain" / "common.pt")
    assert isinstance(read_torch_file(tmp_path / "plain" / "common.pt")["args"], Named)
    tree = make_tree(made["data"], teacher={"load": str(tmp_path / "plain"), "model_config": made["model"]})
    world(1).run(one_step, tree, True)
    assert not proof.exists()


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_files_of_another_version_or_of_nothing_are_refused_in_a_line(made: dict[str, str], tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str) -> None:
        tree = make_tree(made["data"], teacher={"load": str(path), "model_config": made["model"]})
        with pytest.raises(error, match=match):
            check_run(make_config(tree), 1)

    path = tmp_path / "plain"
    shutil.copytree(f"{made['folder']}/plain", path)
    good = (path / "metadata.json").read_text()
    for keys in ({"sharded_backend_version": 2}, {"sharded_backend": "fsdp_dtensor"}, {"checksums": "crc"}):
        change(path / "metadata.json", **keys)
        refused(MismatchError, f"{next(iter(keys))} is .*another version of megatron-core")
        (path / "metadata.json").write_text(good)
    (path / "metadata.json").write_text("[1")
    refused(CorruptError, "metadata.json cannot be read")
    (path / "metadata.json").write_text(good)
    (path / "common.pt").write_bytes(b"no zip")
    refused(CorruptError, "common.pt is not a file of torch.save")
    (path / ".metadata").write_bytes(b"\x80\x04K\x01.")
    refused(CorruptError, ".metadata lists no tensors")


def test_adopted_ones_are_checked_from_then_on(
    made: dict[str, str], world: Worlds, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(f"{made['folder']}/mlm", tmp_path / "mlm")
    bare = read_record(tmp_path / "mlm").fingerprint
    assert run(verify.main, ["--adopt", str(tmp_path / "mlm")]) == 0
    assert capsys.readouterr().out.count("iter_0000007: whole: megakd-checkpoint") == 1
    record = read_record(tmp_path / "mlm")
    assert record.fingerprint == bare and record.foreign and record.checked and record.rows == 252
    (record.path / "__0_0.distcp").write_bytes(bytes(len((record.path / "__0_0.distcp").read_bytes())))
    tree = make_tree(made["data"], teacher={"load": str(tmp_path / "mlm")})
    with pytest.raises(Exception, match="CorruptError: teacher: .*__0_0.distcp: block 0"):
        world(1).run(one_step, tree, True)
    assert run(verify.main, [str(tmp_path / "mlm")]) == 5


def test_a_truncated_one_is_refused_in_a_line(made: dict[str, str], world: Worlds, tmp_path: Path) -> None:
    shutil.copytree(f"{made['folder']}/mlm", tmp_path / "mlm")
    with open(tmp_path / "mlm" / "iter_0000007" / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(Exception, match="CorruptError: teacher: .*iter_0000007 cannot be read: rank 0"):
        world(1).run(one_step, make_tree(made["data"], teacher={"load": str(tmp_path / "mlm")}), True)

"""Weights read without a process group: what megatron-core reads of the checkpoint, whatever layout wrote it."""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import write_foreign
from runs import make_tree, run_training, weights, write_dataset
from worlds import Worlds

from megakd.errors import CorruptError
from megakd.model.checkpoint.plain_pickle import BROKEN_PICKLE
from megakd.model.checkpoint.record import read_record
from megakd.model.checkpoint.tensor_reader import TensorReader
from megakd.model.huggingface.shard_writer import bytes_of

pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest")

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48}
SPLIT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}
LAYOUTS = {
    "whole": (1, {}, {}),
    "experts": (1, EXPERTS, {}),
    "split": (4, {"bf16": True, "add_qkv_bias": True}, SPLIT),
    "split-experts": (4, EXPERTS, {**SPLIT, "expert_model_parallel_size": 2, "sequence_parallel": True}),
}


def train_one_step(folder: Path, world: Worlds, name: str) -> str:
    size, student, parallel = LAYOUTS[name]
    save = str(folder / name)
    tree = make_tree(
        write_dataset(folder / "data"),
        training={"train_iters": 1},
        student=student,
        parallel=parallel,
        checkpoint={"save": save},
    )
    world(size).run(run_training, tree)
    return save


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> str:
    return train_one_step(tmp_path_factory.mktemp("reader"), world, "whole")


def check_against_megatron(run: str, world: Worlds) -> None:
    expected = {name: content for name, content in world(1).run(weights, run, 1)[0].items() if "optimizer" not in name}
    reader = TensorReader(read_record(run))
    assert expected.keys() == reader.names
    for name, content in expected.items():
        tensor = reader.read(name)
        assert bytes_of(tensor) == content, name
        assert (tuple(tensor.shape), tensor.dtype) == (reader.shape(name), reader.dtype(name))
        if "layers" in name:
            assert all(reader.read(name, layer).equal(tensor[layer]) for layer in range(len(tensor)))
        if "experts" in name:
            assert reader.read(name, 2, 3).equal(tensor[2, 3])


def test_tensors_are_megatrons(whole: str, world: Worlds) -> None:
    check_against_megatron(whole, world)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "split", pytest.param("split-experts", marks=pytest.mark.long)])
def test_tensors_of_any_layout(tmp_path: Path, world: Worlds, name: str) -> None:
    check_against_megatron(train_one_step(tmp_path, world, name), world)


@pytest.mark.slow
def test_foreign_checkpoints_have_our_names(whole: str, tmp_path: Path, world: Worlds) -> None:
    world(1).run(write_foreign, whole, str(tmp_path))
    record = read_record(whole)
    own = TensorReader(record)
    for name in ("mlm", "prefixed", "apart"):
        reader = TensorReader(read_record(tmp_path / name, shape=record.shape))
        assert reader.names == own.names, name
        for tensor in own.names:
            assert reader.shape(tensor) == own.shape(tensor)
            for layer in range(4) if "layers" in tensor else ():
                assert reader.read(tensor, layer).equal(own.read(tensor, layer))
        assert reader.read("embedding.word_embeddings.weight").equal(own.read("embedding.word_embeddings.weight"))


def changed(run: str, folder: Path) -> tuple[Any, Path]:
    shutil.copytree(run, folder)
    record = read_record(folder)
    return record, record.path


def test_damage_is_found_by_the_hashes(whole: str, tmp_path: Path) -> None:
    record, path = changed(whole, tmp_path / "run")
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    reader = TensorReader(record)
    with pytest.raises(CorruptError, match="is damaged: __0_0.distcp: block 0"):
        [reader.read(name) for name in reader.names]


def test_a_cut_file_and_one_that_is_missing(whole: str, tmp_path: Path) -> None:
    record, path = changed(whole, tmp_path / "run")
    with open(path / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptError, match="1000 bytes, .* the file was cut"):
        TensorReader(record)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CorruptError, match="its file is not there"):
        TensorReader(record)


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/megakd-hostile-chunk-ran",)


def test_chunks_run_nothing(whole: str, tmp_path: Path) -> None:
    record, path = changed(whole, tmp_path / "run")
    reader = TensorReader(dataclasses.replace(record, checked=False))
    stored = reader._stored["decoder.final_layernorm.weight"].chunks[0]
    proof = Path("/tmp/megakd-hostile-chunk-ran")
    proof.unlink(missing_ok=True)
    with open(path / "__0_0.distcp", "r+b") as file:
        file.seek(stored.start)
        file.write(pickle.dumps(Hostile()))
    with pytest.raises(CorruptError, match="cannot be read"):
        reader.read("decoder.final_layernorm.weight")
    torch.save(Hostile(), tmp_path / "whole.pt")
    hostile = (tmp_path / "whole.pt").read_bytes()
    with open(path / "__0_0.distcp", "r+b") as file:
        file.seek(stored.start)
        file.write(hostile[: stored.length].ljust(stored.length, b"\0"))
    with pytest.raises(CorruptError, match="cannot be read"):
        reader.read("decoder.final_layernorm.weight")
    (path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CorruptError, match="cannot be trusted"):
        TensorReader(record)
    assert not proof.exists() and OSError in BROKEN_PICKLE

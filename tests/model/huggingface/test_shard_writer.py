"""Safetensors files that are written as a stream: what the safetensors package reads, cut at the given size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.artefacts.durable_files import hash_file
from megakd.model.huggingface.shard_writer import TensorSpec, index_of, plan_shards, write_shard

TENSORS: dict[str, Tensor] = {
    "a": torch.randn(7, 13),
    "b": torch.randn(251).bfloat16(),
    "c": torch.randn(3, 1, 5).half(),
    "d": torch.randn(13, 7).t(),
    "\u00fc": torch.randn(2),
}


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("max_bytes", [1, 400, 600, 10**9])
def test_files_are_those_of_the_format(tmp_path: Path, max_bytes: int) -> None:
    shards = plan_shards(specs(), max_bytes)
    steps: list[int] = []
    for shard in shards:
        record = write_shard(tmp_path, shard, lambda spec: TENSORS[spec.name], progress=steps.append)
        assert record == hash_file(tmp_path / shard.file) and record.size_bytes == shard.num_bytes
        with safe_open(tmp_path / shard.file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {spec.name for spec in shard.tensors}
            for spec in shard.tensors:
                assert opened.get_tensor(spec.name).equal(TENSORS[spec.name])
        assert sum(spec.num_bytes for spec in shard.tensors) <= max_bytes or len(shard.tensors) == 1
    assert sum(steps) == sum(spec.num_bytes for spec in specs())
    names = [spec.name for shard in shards for spec in shard.tensors]
    assert sorted(names) == sorted(TENSORS)
    index = index_of(shards)
    if len(shards) == 1:
        assert shards[0].file == "model.safetensors" and index is None
        return
    assert index is not None
    told = json.loads(index)
    assert told["metadata"]["total_size"] == sum(spec.num_bytes for spec in specs())
    assert told["weight_map"] == {spec.name: shard.file for shard in shards for spec in shard.tensors}
    assert shards[0].file == f"model-00001-of-{len(shards):05d}.safetensors"


def test_one_file_has_the_layout_of_the_package(tmp_path: Path) -> None:
    [shard] = plan_shards(specs(), 10**9)
    write_shard(tmp_path, shard, lambda spec: TENSORS[spec.name])
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    ours, theirs = load_file(tmp_path / shard.file), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert (tmp_path / shard.file).stat().st_size == (tmp_path / "theirs").stat().st_size


def test_every_tensor_is_aligned_to_its_numbers() -> None:
    for shard in plan_shards(specs(), 700):
        at = len(shard.header)
        for spec in shard.tensors:
            assert at % spec.dtype.itemsize == 0
            at += math.prod(spec.shape) * spec.dtype.itemsize


def test_an_unfinished_file_is_not_there(tmp_path: Path) -> None:
    def read(spec: TensorSpec) -> Tensor:
        if spec.name == "d":
            raise OSError("gone")
        return TENSORS[spec.name]

    [shard] = plan_shards(specs(), 10**9)
    with pytest.raises(OSError, match="gone"):
        write_shard(tmp_path, shard, read)
    assert list(tmp_path.iterdir()) == []

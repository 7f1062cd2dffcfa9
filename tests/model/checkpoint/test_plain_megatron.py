"""Checkpoints of ours in plain megatron-core, in a process that knows nothing of megakd."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.model.checkpoint.record import read_record
from megakd.model.checkpoint.tensor_reader import TensorReader

PROGRAM = Path(__file__).parent / "plain_megatron.py"


@pytest.mark.slow
def test_a_gpt_model_of_megatron_core_loads_it(tmp_path: Path, world: Worlds) -> None:
    tree = make_tree(
        write_dataset(tmp_path / "data"),
        training={"train_iters": 1},
        student={"num_query_groups": 2, "add_qkv_bias": True, "qk_layernorm": False},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"save": str(tmp_path / "run")},
    )
    world(2).run(run_training, tree)
    record = read_record(tmp_path / "run")
    reader = TensorReader(record)
    rows = reader.shape("embedding.word_embeddings.weight")[0]
    shape = json.dumps({**dataclasses.asdict(record.shape), "rows": rows})
    output = tmp_path / "weights.pt"
    subprocess.run(
        [sys.executable, str(PROGRAM), str(record.path), shape, str(output)],
        check=True,
        timeout=200,
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    weights = torch.load(output, weights_only=True)
    assert weights["embedding.word_embeddings.weight"].equal(reader.read("embedding.word_embeddings.weight"))
    assert weights["output_layer.weight"].equal(reader.read("output_layer.weight"))
    for layer in range(4):
        for ours in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "mlp.linear_fc1.weight"):
            stored = reader.read(f"decoder.layers.{ours}", layer)
            assert weights[f"decoder.layers.{layer}.{ours}"].equal(stored), ours
        norm = reader.read("decoder.layers.mlp.linear_fc1.layer_norm_weight", layer)
        assert weights[f"decoder.layers.{layer}.pre_mlp_layernorm.weight"].equal(norm)
    assert len(weights) == 3 + 4 * 7

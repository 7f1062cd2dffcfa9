"""What a run writes about itself: losses that do not depend on how a batch is cut, evaluation, bits per byte, order."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import make_config, make_tree, one_step, output_of_training, run_training, write_dataset
from worlds import Worlds

from megakd.data.indexed.writer import IndexedWriter
from megakd.data.tokenizer import build_tokenizer
from megakd.model.config import ModelConfig
from megakd.train.evaluate import Evaluation, HeldOut
from megakd.train.preflight import check_run
from megakd.train.record.metrics import Cost, _keep_until, _line


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_logged_loss_does_not_depend_on_microbatches(world: Worlds, tmp_path: Path) -> None:
    """megatron divides the loss it was given in place; what is logged must be a tensor of its own."""
    data = write_dataset(tmp_path / "data")
    one = world(1).run(one_step, make_tree(data, training={"micro_batch_size": 8}))[0]
    many = world(1).run(one_step, make_tree(data, training={"micro_batch_size": 1}))[0]
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert many["loss"] == pytest.approx(many["lm"], rel=1e-6)
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_record_of_a_run(world: Worlds, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("ByteTokenizer", None)
    text = "".join(chr(97 + i * i % 23) for i in range(4000))
    writer = IndexedWriter(tmp_path / "data", np.uint16)
    ids = np.array([*tokenizer.encode(text), tokenizer.eod])
    writer.add_documents(ids, np.array([len(ids)], np.int32), np.array([len(text)]))
    writer.finish(parameters={}, parents={}, tokenizer=tokenizer.describe())
    data = str(tmp_path / "data")
    found = {}
    for size in (1, 2):
        save = tmp_path / f"run{size}"
        tree = make_tree(
            data,
            data={"valid_data_path": [data]},
            evaluate={"eval_interval": 2, "eval_iters": 3},
            checkpoint={"save": str(save)},
        )
        assert set(world(size).run(run_training, tree)) == {0}
        found[size] = records(save)
        assert yaml.safe_load((save / "config.yaml").read_text())["training"]["train_iters"] == 4
        assert list((save / "tensorboard").iterdir())
    again = make_tree(data, training={"seed": 6}, data={"valid_data_path": [data]})
    orders = [check_run(make_config(one), 1).valid_blend for one in (tree, again)]
    drawn = [blend.draw(np.arange(24)).sample_id.tolist() for blend in orders if blend is not None]
    assert drawn[0] == drawn[1], "a part of the held-out samples must be the same part for every seed"
    steps = [record["step"] for record in found[1] if "loss" in record]
    assert steps == [1, 2, 3, 4]
    evaluations = {record["step"]: record["valid"] for record in found[1] if "valid" in record}
    assert sorted(evaluations) == [2, 4]
    for valid in evaluations.values():
        assert valid["num_tokens"] == 3 * 8 * 16
        # every token is one byte, but for the end of the document, which has its share of the document's bytes
        assert valid["bits_per_byte"] == pytest.approx(valid["lm_loss"] / math.log(2), rel=5e-3)
        assert "loss" not in valid  # which one it is has a name; without a teacher the total is the LM loss
        assert valid["total_loss"] == pytest.approx(valid["lm_loss"], rel=1e-6)
    held_out = [[record["held_out"] for record in found[size] if "held_out" in record] for size in (1, 2)]
    assert held_out[0] == held_out[1] and held_out[0][0] == held_out[0][1]
    assert held_out[0][0]["num_samples"] == 24 and held_out[0][0]["tokenizer"] == tokenizer.describe()["hash"]
    assert held_out[0][0]["bytes_of"] == "documents" and 380 <= held_out[0][0]["num_bytes"] <= 384
    for one, two in zip(found[1], found[2]):
        assert one.get("flops") == two.get("flops") and "teacher_flops" not in one
        for key in ("loss", "grad_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-5)
        if "valid" in one:
            assert two["valid"]["bits_per_byte"] == pytest.approx(one["valid"]["bits_per_byte"], rel=1e-5)


@pytest.mark.slow
def test_evaluation_alone_changes_nothing(world: Worlds, tmp_path: Path) -> None:
    data, save = write_dataset(tmp_path / "data"), tmp_path / "run"
    groups: dict[str, Any] = {
        "data": {"valid_data_path": [data]},
        "evaluate": {"eval_interval": 4, "eval_iters": 2},
        "checkpoint": {"save": str(save)},
    }
    (printed,) = world(1).run(output_of_training, make_tree(data, **groups))
    (trained,) = [record["valid"] for record in records(save) if "valid" in record]
    assert "bits_per_byte" not in trained and "| bits per byte" not in printed
    assert f"no bits per byte: {data}: the dataset does not record the bytes of its text" in printed
    before = sorted(path.name for path in save.glob("iter_*"))
    groups["evaluate"]["skip_train"] = True
    groups["training"] = {"train_iters": 8}
    assert world(2).run(run_training, make_tree(data, **groups)) == [0, 0]
    again = records(save)[-1]
    assert again["step"] == 4 and again["valid"]["lm_loss"] == pytest.approx(trained["lm_loss"], rel=1e-6)
    assert sorted(path.name for path in save.glob("iter_*")) == before == ["iter_0000004"]


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_run_says_what_it_saved(world: Worlds, tmp_path: Path, background: bool) -> None:
    save = tmp_path / "run"
    checkpoint = {"save": str(save), "save_interval": 2, "async_save": background}
    printed = world(1).run(output_of_training, make_tree(write_dataset(tmp_path / "data"), checkpoint=checkpoint))[0]
    for step in (2, 4):
        assert f"saved checkpoint {save}/iter_{step:07d}\n" in printed


def test_validation_says_which_loss_is_which() -> None:
    held_out = HeldOut("f", 8, 128, None, None)
    rest: dict[str, Any] = {"teacher_entropy": None, "z_loss": None, "bits_per_byte": None, "num_tokens": 128}
    rest |= {"held_out": held_out, "calibration_error": 0.5}
    plain = Evaluation(lm_loss=3.0, kd_loss=None, total_loss=3.0, alpha=None, lm_weight=None, agreement=None, **rest)
    assert _line(plain) == "lm loss: 3 | total loss: 3 | calibration error: 0.5 | num tokens: 128"
    online = Evaluation(lm_loss=3.0, kd_loss=1.0, total_loss=1.5, alpha=0.75, lm_weight=0.25, agreement=0.5, **rest)
    assert "lm loss: 3 | kd loss: 1 | total loss: 1.5 (0.25 lm + 0.75 kd) | agreement: 0.5 |" in _line(online)
    offline = replace(plain, total_loss=None)
    assert "total loss: not known, no teacher speaks about the held-out data" in _line(offline)


def test_a_record_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":2,"valid":{}}\n{"step":3}\n{"st')
    _keep_until(path, 2)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":2,"valid":{}}\n'
    _keep_until(tmp_path / "none", 2)


def test_floating_point_operations_count_the_teacher() -> None:
    """Counted by hand for a shape small enough to do so."""
    shape = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=1
    ).resolve("student")
    matmuls = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)  # q, k and v, projection, gate + up + down
    forward = 2 * matmuls + 2 * 2 * 2 * 4 * 10 + 2 * 8 * 100  # + causal scores over 10 tokens + head of 100
    cost = Cost.of(shape, shape, seq_length=10, vocab_size=100)
    assert cost.teacher == forward and cost.student == 3 * forward
    assert Cost.of(shape, None, seq_length=10, vocab_size=100).teacher == 0


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["without", "mixed"])
def test_evaluation_is_over_the_labels_that_training_is_over(ends: str, world: Worlds, tmp_path: Path) -> None:
    """--eod-mask-loss leaves out the first tokens of documents in either, and their bytes, however documents end."""
    tokenizer = build_tokenizer("ByteTokenizer", None)
    rng = np.random.default_rng(0)
    documents = [rng.integers(97, 123, length) for length in rng.integers(1, 40, 60)]
    end = {"without": [False], "mixed": [True, False]}[ends]
    documents = [np.append(ids, tokenizer.eod) if end[i % len(end)] else ids for i, ids in enumerate(documents)]
    sizes = rng.integers(0, 90, len(documents))  # a tokenizer that loses and makes up bytes
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.concatenate(documents), np.array([len(ids) for ids in documents], np.int32), sizes)
        writer.finish(parameters={"append_eod": False}, tokenizer=tokenizer.describe())
    data, save = str(tmp_path / "data"), tmp_path / "run"
    tree = make_tree(
        data,
        data={"valid_data_path": [data], "eod_mask_loss": True},
        training={"train_iters": 8},
        evaluate={"eval_interval": 8, "eval_iters": 1000},
        checkpoint={"save": str(save)},
    )
    assert world(1).run(run_training, tree) == [0]
    stream, starts = np.concatenate(documents), np.cumsum([0, *map(len, documents)])
    batches = (len(stream) - 1) // 16 // 8
    plan = check_run(make_config(tree), 1)
    assert plan.valid_blend is not None
    samples = plan.valid_blend.draw(np.arange(8 * batches)).sample_id
    labels = (samples[:, None] * 16 + 1 + np.arange(16)).reshape(-1)
    scored = labels[~np.isin(labels, starts)]
    assert len(scored) < len(labels)
    (valid,) = [record["valid"] for record in records(save) if "valid" in record]
    assert valid["num_tokens"] == len(scored)
    shares: list[int] = []
    for ids, size in zip(documents, sizes.tolist()):
        shares += [size * (i + 1) // len(ids) - size * i // len(ids) for i in range(len(ids))]
    num_bytes = int(np.array(shares)[scored].sum())
    (held_out,) = [record["held_out"] for record in records(save) if "held_out" in record]
    assert held_out["num_bytes"] == num_bytes
    bits = valid["lm_loss"] * len(scored) / math.log(2) / num_bytes
    assert valid["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    first = (plan.blend.draw(np.arange(8)).sample_id[:, None] * 16 + 1 + np.arange(16)).reshape(-1)
    assert world(1).run(one_step, tree | {"checkpoint": {}})[0]["tokens"] == int(np.sum(~np.isin(first, starts)))

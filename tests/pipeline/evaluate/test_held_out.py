"""Held-out figures of the verb: equal to those of training's own evaluation, in any layout, also beside a teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.evaluate.evaluate_runs import results_in, run_evaluate
from runs import TOKENIZER, VOCAB, make_config, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.indexed.writer import IndexedWriter
from megakd.data.loader import Loader
from megakd.train.preflight import check_run

SEQ = 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> Path:
    """A teacher, a student distilled from it, held-out data, and the record of the student's last evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_dataset(folder / "data")
    held = [write_held_out(folder / f"held{seed}", num_tokens=1000 * seed) for seed in (1, 2)]
    world(1).run(run_training, make_tree(data, checkpoint={"save": str(folder / "teacher")}))
    tree = make_tree(
        data,
        teacher={"load": str(folder / "teacher")},
        data={"valid_data_path": held, "eod_mask_loss": True},
        evaluate={"eval_interval": 0, "eval_iters": 20},
        checkpoint={"save": str(folder / "student")},
        training={"seed": 6},
    )
    world(1).run(run_training, tree)
    return folder


def write_held_out(prefix: Path, *, num_tokens: int) -> str:
    """Documents of 50 tokens, which stand for texts of 100 to 300 bytes."""
    rng = np.random.default_rng(num_tokens)
    lengths = np.full(num_tokens // 50, 50, np.int32)
    writer = IndexedWriter(prefix, np.uint16)
    writer.add_documents(rng.integers(0, VOCAB, num_tokens), lengths, rng.integers(100, 300, len(lengths)))
    writer.finish(parameters={}, parents={}, tokenizer=TOKENIZER)
    return str(prefix)


def tree_of(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    held = [str(folder / "held1"), str(folder / "held2")]
    tree = {"load": str(folder / "student"), "data_path": held, "output": str(output), "log_interval": 1000}
    return tree | more


def of_training(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "student" / "metrics.jsonl").read_text().splitlines()]
    (record,) = [record for record in records if "held_out" in record]
    return record


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (4, 2, 1), (4, 2, 2)], ids=["1", "TP2 DP2", "TP2 PP2"])
def test_equals_trainings_own_evaluation(
    trained: Path, tmp_path: Path, world: Worlds, layout: tuple[int, int, int]
) -> None:
    """The same samples in the same order: the same figures, to the precision of sums in another order."""
    ranks, tensor, pipeline = layout
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    more = {"eod_mask_loss": True, "eval_samples": 160, "teacher_load": str(trained / "teacher")}
    printed = world(ranks).run(run_evaluate, tree_of(trained, tmp_path, **sizes, **more))
    record, ours = of_training(trained), results_in(tmp_path)["held_out"]
    theirs = record["valid"]
    for key in ("lm_loss", "calibration_error", "num_tokens", "bits_per_byte"):
        assert ours[key] == pytest.approx(theirs[key], rel=2e-6), key
    for key, name in (("kl_divergence", "kd_loss"), ("agreement", "agreement"), ("teacher_entropy", "teacher_entropy")):
        assert ours["teacher"][key] == pytest.approx(theirs[name], rel=2e-5), key
    for key in ("fingerprint", "num_samples", "num_tokens", "tokenizer", "num_bytes", "bytes_of"):
        assert ours["data"][key] == record["held_out"][key], key
    assert ours["perplexity"] == pytest.approx(math.exp(ours["lm_loss"]))
    assert "lm_loss" in printed[0] and not "".join(printed[1:])


@pytest.mark.slow
def test_every_sample_once_and_the_model_beside_itself(trained: Path, tmp_path: Path, world: Worlds) -> None:
    world(1).run(run_evaluate, tree_of(trained, tmp_path, teacher_load=str(trained / "student")))
    ours = results_in(tmp_path)["held_out"]
    parts = ours["datasets"]
    assert ours["data"]["every_sample_once"] and ours["num_samples"] == 999 // SEQ + 1999 // SEQ
    assert {part["num_samples"] for part in parts.values()} == {999 // SEQ, 1999 // SEQ}
    for key in ("lm_loss", "accuracy"):
        sums = sum(part[key] * part["num_tokens"] for part in parts.values())
        assert ours[key] == pytest.approx(sums / ours["num_tokens"], rel=1e-12)
    assert ours["teacher"]["agreement"] == 1 and abs(ours["teacher"]["kl_divergence"]) < 1e-6
    assert ours["teacher"]["teacher_lm_loss"] == pytest.approx(ours["lm_loss"], rel=1e-7)
    assert list((trained / "student" / "tensorboard").glob("*")), "the run's own board has the figures too"


@pytest.mark.slow
def test_a_split_leaves_the_samples_that_training_evaluates(trained: Path, tmp_path: Path, world: Worlds) -> None:
    data = str(trained / "held2")
    theirs = check_run(make_config(make_tree(data, data={"split": "70,20,10"})), 1).valid_blend
    assert theirs is not None
    order = Loader(theirs, seq_length=SEQ, micro_batch_size=1, global_batch_size=1).order_fingerprint()
    world(1).run(run_evaluate, tree_of(trained, tmp_path, data_path=[data], split="70,20,10"))
    ours = results_in(tmp_path)["held_out"]
    assert ours["data"]["fingerprint"] == order
    assert ours["num_samples"] == theirs.datasets[0].num_samples == 400 // SEQ - 1

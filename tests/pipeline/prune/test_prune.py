"""Pruning against a float64 twin and a cut by hand: whole, in any layout, and with parts that are dead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.prune.prune_runs import EMBEDDING, HEAD, SEQ, cut_by_hand, plant, prune, report_of, tensors, twin_of
from pipeline.score.score_runs import run_score
from runs import VOCAB, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.model.checkpoint.record import read_record
from megakd.pipeline.prune.artefact import read_importance
from megakd.pipeline.prune.preflight import draw_calibration

COUNT = 10
SIZES = ("--num-layers", "2", "--hidden-size", "20", "--ffn-hidden-size", "42", "--num-attention-heads", "2")
GROUPED = {"num_query_groups": 2, "add_qkv_bias": True, "init_method_std": 0.2}


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Teachers with grouped and with single heads, tied and not, and a student of the first."""
    folder = tmp_path_factory.mktemp("prune")
    made: dict[str, Any] = {"folder": folder, "data": write_dataset(folder / "data", num_tokens=1900)}
    for name, changes in (
        ("grouped", GROUPED),
        ("single", GROUPED | {"num_query_groups": 4, "untie_embeddings_and_output_weights": False}),
    ):
        tree = make_tree(made["data"], training={"train_iters": 3}, checkpoint={"save": str(folder / name)})
        tree["student"] |= changes
        assert world(1).run(run_training, tree) == [0]
        made[name] = str(folder / name)
    made["student"] = run(world, made, folder / "student", *SIZES)
    return made


def run(world: Worlds, made: dict[str, Any], save: Path, *flags: str, load: str = "grouped", ranks: int = 1) -> str:
    """Prune a teacher; what is printed."""
    words: tuple[str, ...] = ("--load", made.get(load, load), "--save", str(save), "--data-path", made["data"])
    words += ("--seq-length", str(SEQ), "--calibration-samples", str(COUNT), "--micro-batch-size", "3", *flags)
    results = world(ranks).run(prune, *words)
    assert [status for status, _, _ in results] == [0] * ranks, results
    assert not any(out or err for _, out, err in results[1:])
    return str(results[0][1])


@pytest.mark.slow
def test_importance_and_loss_equal_the_twin(made: dict[str, Any], world: Worlds) -> None:
    ids = draw_calibration(118, count=COUNT, seed=1234).tolist()
    assert len(ids) == COUNT
    (expected,) = world(1).run(twin_of, made["grouped"], made["data"], ids)
    found = read_importance(made["folder"] / "student")
    assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    np.testing.assert_allclose(found.layers_L, expected["influence"], rtol=1e-4)
    np.testing.assert_allclose(found.heads_LA, expected["heads"], rtol=1e-4)
    np.testing.assert_allclose(found.neurons_LF, expected["neurons"], rtol=1e-4)
    np.testing.assert_allclose(found.channels_H, expected["channels"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["grouped", "single"])
def test_a_student_equals_a_cut_by_hand(teacher: str, made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    folder = made["folder"] / "student"
    if teacher == "single":
        folder = tmp_path / "student"
        run(world, made, folder, *SIZES, load=teacher)
    record, report = read_record(made[teacher]), report_of(folder)
    neurons = read_importance(folder).neurons_LF[report["layers"]]
    kept = [sorted(np.argsort(-row, kind="stable")[:42].tolist()) for row in neurons]
    (weights,), (student,) = world(1).run(tensors, made[teacher]), world(1).run(tensors, str(folder))
    expected = cut_by_hand(weights, record, report, kept)
    assert student.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(student[name], expected[name]), name
    (twin,) = world(1).run(twin_of, str(folder), made["data"], draw_calibration(118, count=COUNT, seed=1234).tolist())
    assert report["loss"]["student"] == pytest.approx(twin["loss"], rel=1e-5), "the student computes what it should"


@pytest.mark.slow
def test_full_size_is_the_teacher_bit_for_bit(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    run(world, made, tmp_path / "same", "--importance", str(made["folder"] / "student"))
    (weights,), (same,) = world(1).run(tensors, made["grouped"]), world(1).run(tensors, str(tmp_path / "same"))
    assert weights.keys() == same.keys()
    assert all(weights[name].tobytes() == same[name].tobytes() for name in weights)
    report = report_of(tmp_path / "same")
    assert report["loss"]["student"] == pytest.approx(report["loss"]["teacher"], rel=1e-6)


LAYOUTS = [
    pytest.param(2, ("--tensor-model-parallel-size", "2"), marks=pytest.mark.slow),
    pytest.param(2, ("--pipeline-model-parallel-size", "2"), marks=pytest.mark.slow),
    pytest.param(2, (), marks=pytest.mark.long),
    pytest.param(2, ("--tensor-model-parallel-size", "2", "--sequence-parallel"), marks=pytest.mark.long),
    pytest.param(
        4, ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"), marks=pytest.mark.long
    ),
]


@pytest.mark.parametrize("teacher", ["grouped", pytest.param("single", marks=pytest.mark.long)])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_layouts_do_not_matter(
    ranks: int, layout: tuple[str, ...], teacher: str, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    whole = made["folder"] / "student"
    if teacher == "single":
        whole = tmp_path / "whole"
        run(world, made, whole, *SIZES, load=teacher)
    run(world, made, tmp_path / "split", *SIZES, *layout, ranks=ranks, load=teacher)
    here, there = read_importance(whole), read_importance(tmp_path / "split")
    assert there.loss == pytest.approx(here.loss, rel=1e-6)
    for name in ("layers_L", "heads_LA", "neurons_LF", "channels_H"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=1e-5, err_msg=name)
    (one,), (two,) = world(1).run(tensors, str(whole)), world(1).run(tensors, str(tmp_path / "split"))
    for name in one:
        ids = slice(
            VOCAB if name in (EMBEDDING, HEAD) else None
        )  # the layout decides how many rows of padding there are
        assert np.array_equal(one[name][ids], two[name][ids]), name


DEAD: list[Any] = [("group", layer, 1 + layer % 2) for layer in range(4)]
DEAD += [("neuron", layer, 7 * neuron + layer) for layer in range(4) for neuron in range(6)]
DEAD += [("channel", 0, channel) for channel in (0, 5, 6, 30)]


@pytest.mark.slow
def test_dead_parts_go_and_the_student_computes_the_same(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    teacher = str(tmp_path / "dead")
    world(1).run(plant, made["single"], teacher, [*DEAD, ("layer", 2, 0)])
    sizes = ("--hidden-size", "28", "--ffn-hidden-size", "90", "--num-attention-heads", "3", "--num-layers", "3")
    out = run(world, made, tmp_path / "student", *sizes, load=teacher)
    report = report_of(tmp_path / "student")
    assert report["layers"] == [0, 1, 3] and abs(report["influence"][2]) < 1e-6
    assert report["channels"] == [channel for channel in range(32) if channel not in (0, 5, 6, 30)]
    for layer, heads in zip(report["layers"], report["heads"]):
        assert heads == [head for head in range(4) if head != 1 + layer % 2]
    assert report["loss"]["student"] == pytest.approx(report["loss"]["teacher"], rel=2e-6)
    assert "2         0.0000         -" in out and "channels: 28 of 32, share 1.000" in out, out


@pytest.mark.slow
def test_a_dead_group_of_heads_goes_whole(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    teacher = str(tmp_path / "dead")
    world(1).run(plant, made["grouped"], teacher, [("group", layer, layer % 2) for layer in range(4)])
    run(world, made, tmp_path / "s", "--num-attention-heads", "2", "--num-query-groups", "1", load=teacher)
    report = report_of(tmp_path / "s")
    assert report["heads"] == [[2, 3], [0, 1], [2, 3], [0, 1]]
    assert report["loss"]["student"] == pytest.approx(report["loss"]["teacher"], rel=1e-6)


@pytest.mark.slow
def test_a_student_is_an_ordinary_checkpoint(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    student = made["folder"] / "student"
    record = read_record(student)
    teacher = read_record(made["grouped"])
    assert (record.iteration, record.vocab_size, record.seq_length) == (0, teacher.vocab_size, teacher.seq_length)
    assert record.tokenizer == teacher.tokenizer and record.parents["teacher"] == teacher.fingerprint
    scores = {"load": str(student), "data_path": made["data"], "seq_length": SEQ, "output": str(tmp_path / "scores")}
    assert world(1).run(run_score, scores) == [0]
    tree = make_tree(made["data"], training={"train_iters": 2})
    tree["student"] |= GROUPED | {
        "num_layers": 2, "hidden_size": 20, "ffn_hidden_size": 42, "num_attention_heads": 2, "kv_channels": 8
    }  # fmt: skip
    tree["checkpoint"] = {"load": str(student), "finetune": True, "save": str(tmp_path / "tuned")}
    assert world(1).run(run_training, tree) == [0]


@pytest.mark.slow
def test_refusals(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    student = str(made["folder"] / "student")
    common = ("--data-path", made["data"], "--seq-length", str(SEQ), "--load")
    for flags, status, message in (
        ((made["grouped"], "--save", student), 2, "holds checkpoints already"),
        ((made["grouped"], "--save", str(tmp_path / "s"), "--hidden-size", "33"), 2, "--hidden-size 33"),
        ((made["grouped"], "--save", str(tmp_path / "s"), "--importance", student), 4, "calibration_samples: 10 there"),
        (
            (made["single"], "--save", str(tmp_path / "s"), "--importance", student, "--calibration-samples", "10"),
            4,
            "another teacher",
        ),
        ((made["grouped"], "--save", str(tmp_path / "s"), "--importance", str(tmp_path)), 2, "no manifest here"),
    ):
        ((found, _, err),) = world(1).run(prune, *common, *flags)
        assert found == status and message in err, err
    assert not (tmp_path / "s").exists()
    with pytest.raises(AssertionError, match="--num-layers 3 is not a multiple of the 2 pipeline chunks"):
        run(world, made, tmp_path / "s", "--num-layers", "3", "--pipeline-model-parallel-size", "2", ranks=2)

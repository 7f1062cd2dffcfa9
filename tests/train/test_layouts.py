"""Split equals whole: one KD step gives the same loss and gradient norm in every layout of student and teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from marks import slow
from runs import make_tree, one_step, run_training, write_dataset
from worlds import Worlds

TEACHER = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4}


@pytest.fixture(scope="module")
def setting(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data, a teacher's checkpoint, and what one process says about the first step."""
    folder: Path = tmp_path_factory.mktemp("layouts")
    data = write_dataset(folder / "data")
    teacher = str(folder / "teacher")
    tree = make_tree(data, training={"train_iters": 2}, student=TEACHER, checkpoint={"save": teacher})
    assert world(1).run(run_training, tree) == [0]
    whole = make_tree(data, teacher={"load": teacher})
    return {"data": data, "teacher": teacher, "whole": world(1).run(one_step, whole)[0]}


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

# name -> (ranks, the student's layout, the teacher's where it has its own)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, TP2, {}),
    "pp2": (2, PP2, {}),
    "tp2-pp2": (4, {**TP2, **PP2}, {}),
    "interleaved": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, {}),
    "sp": (2, {**TP2, "sequence_parallel": True}, {}),
    "sp-pp2": (4, {**TP2, **PP2, "sequence_parallel": True}, {}),
    "cp2": (2, CP2, {}),
    "cp2-tp2": (4, {**CP2, **TP2}, {}),
    "dp2": (2, {}, {}),
    "dp2-distributed-optimizer": (2, OVERLAP, {}),
    "teacher-pp2": (2, TP2, {"tensor_model_parallel_size": 1, **PP2}),
    "teacher-dp2": (2, TP2, {"tensor_model_parallel_size": 1}),
    "teacher-tp2-pp1": (4, {**TP2, **PP2}, {"pipeline_model_parallel_size": 1}),
    "teacher-tp1-pp2": (4, {**TP2, **PP2}, {"tensor_model_parallel_size": 1}),
    "teacher-tp2-pp2-student-dp4": (4, {}, {**TP2, **PP2}),
    "teacher-cp2-tp1": (4, {**CP2, **TP2}, {"tensor_model_parallel_size": 1}),
    "interleaved-teacher-tp2": (
        4, {**TP2, **PP2, "virtual_pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 1}
    ),
}  # fmt: skip


FAST = ("tp2", "pp2", "cp2", "dp2")  # the others need four ranks, or are combinations of these


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in LAYOUTS])
def test_layout_equals_one_process(name: str, setting: dict[str, Any], world: Worlds) -> None:
    size, parallel, teacher = LAYOUTS[name]
    tree = make_tree(setting["data"], teacher={"load": setting["teacher"], **teacher}, parallel=parallel)
    results = world(size).run(one_step, tree)
    whole = setting["whole"]
    for result in results:
        assert result["tokens"] == whole["tokens"]
        for key in ("loss", "lm", "kd", "grad_norm"):
            assert result[key] == pytest.approx(whole[key], rel=1e-5), key
        assert result["agreement"] == pytest.approx(whole["agreement"], abs=1e-9)


VARIANTS = {
    "tied": ({"untie_embeddings_and_output_weights": False}, {}),
    "qkv-bias-gqa": ({"add_qkv_bias": True, "num_query_groups": 2, "qk_layernorm": False}, {}),
    "experts": ({"num_experts": 4, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.0, "init_method_std": 0.2}, {}),
    "shared-expert-allgather": (
        {"num_experts": 4, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.0, "init_method_std": 0.2,
         "moe_shared_expert_intermediate_size": 32, "moe_token_dispatcher_type": "allgather"}, {},
    ),
    "rope-scaling": ({"rope_scaling_factor": 8.0, "rotary_base": 500000.0}, {}),
}  # fmt: skip
SPLITS = {
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "cp2-pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


PAIRS = [
    # four ranks with experts take longest, and experts are split in the other ways too
    pytest.param(
        variant, split, marks=pytest.mark.long if (variant, split) == ("shared-expert-allgather", "cp2-pp2") else ()
    )
    for variant in VARIANTS
    for split in SPLITS
    if split != "ep2" or "num_experts" in VARIANTS[variant][0]
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "split"), PAIRS)
def test_model_variants_equal_one_process(variant: str, split: str, setting: dict[str, Any], world: Worlds) -> None:
    student, _ = VARIANTS[variant]
    size, parallel = SPLITS[split]
    if "num_experts" in student and "tensor_model_parallel_size" in parallel:
        parallel = {**parallel, "expert_model_parallel_size": 2}
    whole = world(1).run(one_step, make_tree(setting["data"], student=student))[0]
    for result in world(size).run(one_step, make_tree(setting["data"], student=student, parallel=parallel)):
        assert result["lm"] == pytest.approx(whole["lm"], rel=1e-5)
        assert result["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
)
def test_recompute_changes_nothing(recompute: dict[str, Any], setting: dict[str, Any], world: Worlds) -> None:
    plain = world(2).run(one_step, make_tree(setting["data"], parallel={"tensor_model_parallel_size": 2}))[0]
    tree = make_tree(setting["data"], parallel={"tensor_model_parallel_size": 2}, student=recompute)
    assert world(2).run(one_step, tree)[0] == plain


@pytest.mark.slow
def test_bf16_layouts_agree_within_its_precision(setting: dict[str, Any], world: Worlds) -> None:
    student = {"bf16": True}
    teacher = {"load": setting["teacher"]}
    whole = world(1).run(one_step, make_tree(setting["data"], student=student, teacher=teacher))[0]
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    tree = make_tree(setting["data"], student=student, teacher=teacher, parallel=parallel)
    split = world(4).run(one_step, tree)[0]
    assert split["loss"] == pytest.approx(whole["loss"], rel=2e-3)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)
    assert whole["loss"] == pytest.approx(setting["whole"]["loss"], rel=2e-3)

"""FP8 and FP4 that cannot run are refused before anything is loaded; what can is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import make_config, make_tree, write_dataset

from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.model.config import ModelConfig, ModelShape
from megakd.model.low_precision import check_card, check_rows
from megakd.train.preflight import check_run

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)


def shape(**changes: Any) -> ModelShape:
    values = SIZES | {"ffn_hidden_size": 192, "fp8_format": "hybrid"} | changes
    return ModelConfig(**values).resolve("student")


@pytest.mark.parametrize(
    ("changes", "tensor", "words"),
    [
        ({}, 1, None),
        ({}, 2, None),
        ({"fp8_format": None, "kv_channels": 6, "ffn_hidden_size": 10}, 1, None),
        ({"hidden_size": 72, "kv_channels": 16}, 1, "--hidden-size is 72 on a rank; expected a multiple of 16"),
        ({"kv_channels": 6}, 1, r"--num-attention-heads x --kv-channels is 24"),
        ({"num_query_groups": 1, "kv_channels": 4}, 1, r"\+ 2 x --num-query-groups\) x --kv-channels is 24"),
        ({"ffn_hidden_size": 200}, 1, "--ffn-hidden-size is 200"),
        ({"ffn_hidden_size": 176}, 2, "--ffn-hidden-size is 88"),
        ({"ffn_hidden_size": 176}, 1, None),
        ({"ffn_hidden_size": 176, "fp8_recipe": "mxfp8"}, 1, "176 on a rank; expected a multiple of 32 .* mxfp8"),
        ({"ffn_hidden_size": 200, "fp8_format": None, "fp4_format": "e2m1"}, 1, "200 .* --fp4-format e2m1"),
        ({"ffn_hidden_size": 200, "num_experts": 4, "moe_ffn_hidden_size": 64}, 1, None),
        ({"num_experts": 4, "moe_ffn_hidden_size": 40}, 1, "--moe-ffn-hidden-size is 40"),
        ({"fp8_param_gather": True}, 1, "uninitialised memory. Drop it"),
        ({"fp8_format": None, "fp8_param_gather": True}, 1, "uninitialised memory. Drop it"),
    ],
)
def test_widths(changes: dict[str, Any], tensor: int, words: str | None) -> None:
    model, parallel = shape(**changes), ParallelConfig(tensor_model_parallel_size=tensor)
    if words is None:
        model.check_layout(parallel, "student")
        return
    with pytest.raises(UsageError, match=f"student: .*{words}"):
        model.check_layout(parallel, "student")


@pytest.mark.parametrize(
    ("recipe", "layout", "rows", "fits"),
    [
        ("tensorwise", {}, (1, 24), True),
        ("tensorwise", {}, (1, 20), False),
        ("tensorwise", {}, (2, 20), True),
        ("tensorwise", {"tensor_model_parallel_size": 2}, (1, 24), True),
        ("tensorwise", {"tensor_model_parallel_size": 2, "sequence_parallel": True}, (1, 24), False),
        ("tensorwise", {"context_parallel_size": 2}, (1, 24), False),
        ("mxfp8", {}, (1, 48), False),
        ("mxfp8", {}, (1, 64), True),
        (None, {}, (1, 7), True),
    ],
)
def test_tokens(recipe: str | None, layout: dict[str, Any], rows: tuple[int, int], fits: bool) -> None:
    model = shape(fp8_recipe=recipe) if recipe else shape(fp8_format=None)
    sizes = {"micro_batch_size": rows[0], "seq_length": rows[1]}
    if fits:
        check_rows(model, ParallelConfig(**layout), "student", **sizes)
        return
    with pytest.raises(UsageError, match=f"--seq-length {rows[1]} over .* expected a multiple of"):
        check_rows(model, ParallelConfig(**layout), "student", **sizes)


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("delayed", ADA), ("tensorwise", ADA), ("blockwise", HOPPER), ("mxfp8", BLACKWELL), ("fp4", BLACKWELL)],
)
def test_cards(recipe: str, least: tuple[int, int]) -> None:
    formats = {"fp8_format": None, "fp4_format": "e2m1"} if recipe == "fp4" else {"fp8_recipe": recipe}
    for capability in (AMPERE, ADA, HOPPER, BLACKWELL, (12, 0)):
        if capability >= least:
            check_card(shape(**formats), capability, "a card")
            continue
        way = "it has no FP8" if capability == AMPERE else "it has --fp8-format with --fp8-recipe delayed or tensorwise"
        with pytest.raises(UsageError, match=f"a card has {capability[0]}.{capability[1]}: {way}"):
            check_card(shape(**formats), capability, "a card")
    check_card(shape(fp8_format=None), AMPERE, "a card")


def test_a_run_is_refused_before_it_loads(tmp_path: Path) -> None:
    """Student and microbatch; a frozen model keeps no weights in FP8, whatever the checkpoint was trained with."""
    data = write_dataset(tmp_path / "data")
    for changes, words in (
        ({"fp8_param_gather": True}, "--fp8-param-gather is refused"),
        ({"fp8_format": "hybrid", "ffn_hidden_size": 100}, "student: --ffn-hidden-size is 100"),
    ):
        with pytest.raises(UsageError, match=words):
            check_run(make_config(make_tree(data, student=changes)), 1)
    tree = make_tree(data, student={"fp8_format": "hybrid"}, data={"seq_length": 10})
    with pytest.raises(UsageError, match="student: --micro-batch-size 2 x --seq-length 10"):
        check_run(make_config(tree), 1)
    frozen = replace(shape(), fp8_param_gather=True).frozen(
        transformer_impl="auto", bf16=True, fp8_format="hybrid", fp8_recipe="tensorwise"
    )
    frozen.check_layout(ParallelConfig(), "teacher")
    assert ModelConfig().fp8_recipe == "tensorwise"

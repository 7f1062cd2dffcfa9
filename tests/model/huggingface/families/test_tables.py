"""Tables of the families against the tensors of transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megakd.model.config import ModelShape
from megakd.model.huggingface.config_json import read_config_json
from megakd.model.huggingface.families.by_model_type import FAMILIES

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 131, "head_dim": 4,
}  # fmt: skip
EXPERTS = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 7, "num_experts_per_tok": 2},
}


def shape_of(folder: Path, config: dict[str, Any]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(config))
    return read_config_json(folder, "a model").shape


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_and_sizes_are_those_of_the_class(tmp_path: Path, model_type: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = SIZES | EXPERTS.get(model_type, {}) | {"tie_word_embeddings": tied}
    if model_type != "qwen3":
        del keys["head_dim"]
    config = AutoConfig.for_model(model_type, **keys, pad_token_id=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if tied:
        del theirs["lm_head.weight"]
    shape = shape_of(tmp_path, keys | {"model_type": model_type})
    table = [(tensor.theirs, tensor.size) for tensor in FAMILIES[model_type].tensors(shape, 131)]
    assert len(table) == len(dict(table)), "a tensor has two rows"
    ours = {name: size for name, size in table if "experts" not in name and ".gate." not in name}
    expected = {name: size for name, size in theirs.items() if ".experts" not in name and ".gate." not in name}
    assert ours == expected
    experts = dict(table).keys() - ours.keys()
    assert len(experts) == (4 * (3 * 3 + 1) if model_type in EXPERTS else 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_of_theirs_fill_ours(tmp_path: Path, model_type: str) -> None:
    """Every number of a checkpoint's tensor comes from one number of the folder."""
    shape = shape_of(tmp_path, SIZES | EXPERTS.get(model_type, {}) | {"model_type": model_type})
    numbers: dict[tuple[str, int | None], int] = {}
    for tensor in FAMILIES[model_type].tensors(shape, 131):
        key = (tensor.ours, tensor.expert)
        numbers[key] = numbers.get(key, 0) + torch.Size(tensor.size).numel()
    qkv = numbers["decoder.layers.0.self_attention.linear_qkv.weight", None]
    assert qkv == shape.hidden_size * shape.kv_channels * (shape.num_attention_heads + 2 * shape.num_query_groups)
    stacked = {name.replace("layers.3.", "layers.") for name, _ in numbers if ".layers.3." in name}
    unlayered = {name for name, _ in numbers if ".layers." not in name}
    known = shape.weight_names()
    extra = {name for name in stacked if ".mlp." in name} if shape.num_experts else set()
    assert stacked | unlayered == known | extra

"""``config.json`` of transformers 4 and 5: what is read, and what is refused with its field, value and meaning."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.model.config import ModelShape
from megakd.model.huggingface.config_json import read_config_json

SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 131,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def read(folder: Path, model_type: str = "llama", drop: tuple[str, ...] = (), **keys: Any) -> ModelShape:
    config = {key: value for key, value in SIZES.items() if key not in drop} | {"model_type": model_type} | keys
    (folder / "config.json").write_text(json.dumps(config))
    return read_config_json(folder, "teacher").shape


def test_sizes_and_the_defaults_of_a_class(tmp_path: Path) -> None:
    shape = read(tmp_path)
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, shape.num_query_groups) == (4, 24, 40, 2)
    assert (shape.kv_channels, shape.rotary_base, shape.norm_epsilon, shape.tied) == (4, 10000.0, 1e-6, False)
    assert (shape.padded_vocab_size, shape.max_position_embeddings, shape.bf16) == (131, 2048, False)


@pytest.mark.parametrize(
    ("model_type", "tied", "eps", "theta", "width"),
    [
        ("llama", False, 1e-6, 1e4, 4),
        ("mistral", False, 1e-6, 1e4, 4),
        ("qwen2", False, 1e-6, 1e4, 4),
        ("qwen3", False, 1e-6, 1e4, 128),
        ("smollm3", True, 1e-6, 2e6, 4),
        ("mixtral", False, 1e-5, 1e6, 4),
        ("qwen3_moe", False, 1e-6, 1e4, 4),
    ],
)
def test_defaults_of_every_class(
    tmp_path: Path, model_type: str, tied: bool, eps: float, theta: float, width: int
) -> None:
    """Every default is that of transformers' class, which is asked."""
    from transformers import AutoConfig

    shape = read(tmp_path, model_type)
    assert (shape.tied, shape.norm_epsilon, shape.rotary_base, shape.kv_channels) == (tied, eps, theta, width)
    theirs = AutoConfig.for_model(model_type, **SIZES)
    assert (theirs.tie_word_embeddings, theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"]) == (tied, eps, theta)
    assert shape.max_position_embeddings == theirs.max_position_embeddings
    plain = AutoConfig.for_model(model_type, **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    shape = read(tmp_path, model_type, drop=("num_key_value_heads",), num_attention_heads=plain.num_key_value_heads * 2,
                 head_dim=4)  # fmt: skip
    if model_type != "llama":  # one key/value head for each query head
        assert shape.num_query_groups == plain.num_key_value_heads


def test_null_and_absent_heads(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=None).kv_channels == read(tmp_path).kv_channels == 4
    assert read(tmp_path, "qwen3", head_dim=None).kv_channels == 4
    assert read(tmp_path, head_dim=10).kv_channels == 10
    assert read(tmp_path, num_key_value_heads=None).num_query_groups == 6


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_type_of_weights_under_both_names(tmp_path: Path, key: str) -> None:
    assert read(tmp_path, **{key: "bfloat16"}).bf16
    assert not read(tmp_path, **{key: "float16"}).bf16
    with pytest.raises(MismatchError, match="dtype is 'float8_e4m3fn', expected bfloat16"):
        read(tmp_path, **{key: "float8_e4m3fn"})


def test_rotary_positions_of_both_generations(tmp_path: Path) -> None:
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    old = read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3})
    both = read(
        tmp_path,
        rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", **LLAMA3},
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    )
    nested = read(
        tmp_path,
        layer_types=["full_attention"] * 4,
        rope_parameters={
            "full_attention": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert new == old == both == nested
    assert (new.rotary_base, new.rope_scaling_factor) == (5e5, 8.0)
    assert (new.rope_scaling_low_freq_factor, new.rope_scaling_high_freq_factor) == (2.0, 5.0)
    assert new.rope_scaling_original_max_position_embeddings == 64


def test_linear_scaling_and_yarn(tmp_path: Path) -> None:
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert linear.rotary_seq_len_interpolation_factor == 2.0
    yarn = read(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **YARN, "beta_fast": 20})
    assert (yarn.yarn_rotary_scaling_factor, yarn.yarn_original_max_position_embeddings) == (4.0, 32)
    assert (yarn.yarn_beta_fast, yarn.yarn_beta_slow, yarn.yarn_attention_factor) == (20.0, 1.0, None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of llama, mistral"),
        ({"attention_bias": True}, "attention_bias is True, expected False: a bias in the attention's output"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, expected None: capped logits"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"quantization_config": {"bits": 4}}, "quantised weights; convert them to bfloat16"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has linear_attention, expected"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected ['LlamaForCausalLM']"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "megakd does not run"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', expected one of default"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "change with the length of a sequence"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor None, expected a number"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 1000000.0 in rope_parameters and"),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}},
            },
            "positions that differ from layer to layer",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers is [0], expected"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers is [1, 0, 0, 1]: expected a 0"),
    ],
)
def test_what_models_here_lack_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(message)) as raised:
        read(tmp_path, **keys)
    assert "teacher" in str(raised.value) and "config.json" in str(raised.value)


def test_missing_sizes_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hidden_size is None; expected a positive number"):
        read(tmp_path, drop=("hidden_size",))
    with pytest.raises(UsageError, match="num_hidden_layers is '4'; expected a positive number"):
        read(tmp_path, num_hidden_layers="4")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptError, match="holds no JSON object but a list"):
        read_config_json(tmp_path, "teacher")


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "layer_types", "no_rope_layers"])
@pytest.mark.parametrize("value", [3, True, "full_attention", 1.5])
def test_values_of_another_form(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(CorruptError, match=rf"{key} is {value!r}, expected an? (object|list)"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize("key", ["num_experts", "num_experts_per_tok", "moe_intermediate_size"])
def test_counts_of_experts_that_are_none(tmp_path: Path, key: str) -> None:
    with pytest.raises(CorruptError, match=rf"{key} is 3.5, expected a positive number"):
        read(tmp_path, "qwen3_moe", **{key: 3.5})


def test_layers_without_positions(tmp_path: Path) -> None:
    assert read(tmp_path, "smollm3").no_rope_freq == 4
    assert read(tmp_path, "smollm3", no_rope_layers=[1, 0, 1, 0]).no_rope_freq == 2
    assert read(tmp_path, "smollm3", no_rope_layers=[1, 1, 1, 1]).no_rope_freq is None
    assert read(tmp_path, "smollm3", no_rope_layer_interval=3).no_rope_freq == 3


@pytest.mark.parametrize(
    ("model_type", "keys", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 100}, 100),
        ("mixtral", {}, None),
        ("qwen2", {"sliding_window": 100}, None),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 2}, 100),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4}, None),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
        ("qwen3_moe", {"sliding_window": 100, "use_sliding_window": True}, 100),
        ("llama", {"sliding_window": 100}, None),
    ],
)
def test_sliding_windows(tmp_path: Path, model_type: str, keys: dict[str, Any], window: int | None) -> None:
    shape = read(tmp_path, model_type, **keys)
    assert shape.sliding_window == window
    if window is not None:
        shape.check_sequence(window, "teacher")
        with pytest.raises(UsageError, match=rf"sequences of {window + 1} tokens, .* window of {window}"):
            shape.check_sequence(window + 1, "teacher")


def test_sequences_beyond_the_longest_of_the_model_are_warned_of(tmp_path: Path) -> None:
    shape = read(tmp_path, max_position_embeddings=64)
    with pytest.warns(UserWarning, match=r"teacher: sequences of 65 tokens, and the model was made for 64 \(max_pos"):
        shape.warn_of_length(65, "teacher")
    with warnings.catch_warnings(action="error"):
        shape.warn_of_length(64, "teacher")


def test_experts(tmp_path: Path) -> None:
    shape = read(tmp_path, "qwen3_moe", num_experts=5, num_experts_per_tok=3, moe_intermediate_size=11)
    assert (shape.num_experts, shape.moe_router_topk, shape.moe_ffn_hidden_size) == (5, 3, 11)
    assert shape.moe_router_pre_softmax
    assert not read(tmp_path, "qwen3_moe", norm_topk_prob=True).moe_router_pre_softmax
    shape = read(tmp_path, "mixtral", num_local_experts=3)
    assert (shape.num_experts, shape.moe_router_topk, shape.moe_ffn_hidden_size) == (3, 2, 40)

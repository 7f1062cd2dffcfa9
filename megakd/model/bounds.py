"""Bounds of a model's options: what no model has is a typing error. No torch."""

from __future__ import annotations

from typing import Any

from megakd.errors import UsageError

# Beyond the size of any model: a larger value is a typing error, and would fail in the middle of an allocation.
_LARGEST = {
    "num_layers": 10_000, "hidden_size": 1 << 20, "ffn_hidden_size": 1 << 24, "num_attention_heads": 1 << 16,
    "num_query_groups": 1 << 16, "kv_channels": 1 << 16, "num_experts": 1 << 16, "moe_ffn_hidden_size": 1 << 24,
    "moe_shared_expert_intermediate_size": 1 << 24, "make_vocab_size_divisible_by": 1 << 24, "fp8_margin": 64,
    "fp8_amax_history_len": 1 << 16, "init_method_std": 1e3, "norm_epsilon": 1.0, "rotary_base": 1e12,
    "rope_scaling_factor": 1e6, "rope_scaling_low_freq_factor": 1e6, "rope_scaling_high_freq_factor": 1e6,
    "rope_scaling_original_max_position_embeddings": 1 << 30, "rotary_seq_len_interpolation_factor": 1e6,
    "yarn_rotary_scaling_factor": 1e6, "yarn_original_max_position_embeddings": 1 << 30, "yarn_beta_fast": 1e6,
    "yarn_beta_slow": 1e6, "yarn_attention_factor": 1e6, "no_rope_freq": 10_000,
}  # fmt: skip
_POSITIVE = (
    "norm_epsilon", "rotary_base", "rotary_percent", "init_method_std", "rope_scaling_factor",
    "rope_scaling_low_freq_factor", "rope_scaling_high_freq_factor", "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_attention_factor",
)  # fmt: skip
_AT_LEAST_1 = (
    "ffn_hidden_size", "num_query_groups", "kv_channels", "num_experts", "moe_router_topk", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "make_vocab_size_divisible_by", "recompute_num_layers",
    "fp8_amax_history_len", "rope_scaling_original_max_position_embeddings", "yarn_original_max_position_embeddings",
    "no_rope_freq",
)  # fmt: skip
_LEAST_FACTORS = ("rotary_base", "rope_scaling_factor", "rotary_seq_len_interpolation_factor",
                  "yarn_rotary_scaling_factor")  # fmt: skip


def check_bounds(config: Any) -> None:
    """Refuse options of a ``ModelConfig`` that lie outside their bounds; None is never refused.

    Raises:
        UsageError: names the option, its value and the bound.
    """
    for name in _AT_LEAST_1:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected at least 1")
    for name in _POSITIVE:
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected a positive number")
    if config.rotary_percent > 1:
        raise UsageError(f"--rotary-percent is {config.rotary_percent}; expected at most 1")
    for name in _LEAST_FACTORS:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected at least 1")
    for name, most in _LARGEST.items():
        if getattr(config, name) is not None and getattr(config, name) > most:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(config, name)}; expected at most {most}")

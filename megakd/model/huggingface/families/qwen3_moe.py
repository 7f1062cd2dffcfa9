"""Qwen 3 with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.model.config import ModelShape
from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, QK_NORM, experts
from megakd.model.huggingface.families.table import Family


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of experts; without ``norm_topk_prob`` the chosen keep their share of all experts."""
    return {
        "qk_layernorm": True,
        "num_experts": config.get("num_experts", config.get("num_local_experts", 128)),
        "moe_router_topk": config.get("num_experts_per_tok", 8),
        "moe_ffn_hidden_size": config.get("moe_intermediate_size", 768),
        "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.001),
    }


def _keys(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        "norm_topk_prob": not shape.moe_router_pre_softmax,
        "router_aux_loss_coef": shape.moe_aux_loss_coeff,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=(
        *EMBEDDING_AND_HEAD,
        *ATTENTION,
        *QK_NORM,
        *experts(block="mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "num_key_value_heads": 4,
        "intermediate_size": 6144,
    },
    default_rope_theta=10000.0,
    expected={
        "attention_bias": ((False,), "a bias in the attention's output too, which layers here lack"),
        "decoder_sparse_step": ((1,), "dense layers between those of experts"),
        "mlp_only_layers": (([], None), "dense layers between those of experts"),
    },
    values=_values,
    keys=_keys,
    fixed={"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    optional=frozenset({"sliding_window", "moe_router_pre_softmax"}),
    window=lambda config: config.get("sliding_window", 4096) if config.get("use_sliding_window") else None,
)

"""Mixtral: Mistral's attention with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.model.config import ModelShape
from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, experts
from megakd.model.huggingface.families.table import Family


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": config.get("num_local_experts", config.get("num_experts", 8)),
        "moe_router_topk": config.get("num_experts_per_tok", 2),
        "moe_ffn_hidden_size": config["intermediate_size"],
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.001),
    }


def _keys(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.moe_router_topk,
        "intermediate_size": shape.moe_ffn_hidden_size,
        "router_aux_loss_coef": shape.moe_aux_loss_coeff,
        "sliding_window": shape.sliding_window,
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *experts(block="block_sparse_moe", gate="w1", up="w3", down="w2")),
    defaults={
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "num_key_value_heads": 8,
    },
    default_rope_theta=1000000.0,
    values=_values,
    window=lambda config: config.get("sliding_window"),
    keys=_keys,
    optional=frozenset({"sliding_window"}),
)

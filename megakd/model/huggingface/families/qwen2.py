"""Qwen 1.5, 2 and 2.5: biases in QKV, and windows of upper layers that are off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, FEED_FORWARD, QKV_BIAS
from megakd.model.huggingface.families.table import Family


def window_of_layers(config: Mapping[str, Any]) -> int | None:
    """Return the window of the layers that have one, by ``use_sliding_window`` and ``layer_types``; None without."""
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    layers = config.get("num_hidden_layers", 0)
    windowed = layers > config.get("max_window_layers", 28) if types is None else "sliding_attention" in types
    window: int | None = config.get("sliding_window", 4096)
    return window if windowed else None


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *QKV_BIAS, *FEED_FORWARD),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "num_key_value_heads": 32,
    },
    default_rope_theta=10000.0,
    values=lambda config: {"add_qkv_bias": True},
    window=window_of_layers,
    fixed={"use_sliding_window": False},
    optional=frozenset({"sliding_window"}),  # of a folder that says which layers have it
)

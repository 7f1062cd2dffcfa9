"""Qwen 3: norms of queries and keys, heads of a width of their own, no biases."""

from __future__ import annotations

from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, FEED_FORWARD, QK_NORM
from megakd.model.huggingface.families.qwen2 import window_of_layers
from megakd.model.huggingface.families.table import Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *QK_NORM, *FEED_FORWARD),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    default_rope_theta=10000.0,
    expected={"attention_bias": ((False,), "a bias in the attention's output too, which layers here lack")},
    values=lambda config: {"qk_layernorm": True},
    window=window_of_layers,
    fixed={"use_sliding_window": False},
    optional=frozenset({"sliding_window"}),  # of a folder that says which layers have it
)

"""Llama 2 and 3, SmolLM 2 and the many models of their class."""

from __future__ import annotations

from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, FEED_FORWARD
from megakd.model.huggingface.families.table import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *FEED_FORWARD),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    },
    default_rope_theta=10000.0,
    fixed={"attention_bias": False, "mlp_bias": False},
    whole_heads=True,
    expected={
        "attention_bias": ((False,), "a bias in the attention's output too, which layers here lack"),
        "mlp_bias": ((False,), "biases in the feed-forward layers, which layers here lack"),
    },
)

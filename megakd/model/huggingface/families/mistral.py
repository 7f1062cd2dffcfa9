"""Mistral: a Llama with a sliding window, which no later version has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, FEED_FORWARD
from megakd.model.huggingface.families.table import Family


def _window(config: Mapping[str, Any]) -> int | None:
    """Return the window: 4,096 where the key is absent, as in the class, and none where it is null."""
    window: int | None = config.get("sliding_window", 4096)
    return window


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *FEED_FORWARD),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "num_key_value_heads": 8,
    },
    default_rope_theta=10000.0,
    window=_window,
    keys=lambda shape: {"sliding_window": shape.sliding_window},
    optional=frozenset({"sliding_window"}),
)

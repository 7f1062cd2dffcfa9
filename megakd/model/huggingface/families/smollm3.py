"""SmolLM 3: a Llama whose every fourth layer has no positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megakd.errors import MismatchError
from megakd.model.config import ModelShape
from megakd.model.huggingface.families.parts import ATTENTION, EMBEDDING_AND_HEAD, FEED_FORWARD
from megakd.model.huggingface.families.table import Family


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the interval of layers without positions.

    Raises:
        MismatchError: ``no_rope_layers`` (1 for a layer with positions) is not regular.
    """
    layers = config.get("num_hidden_layers", 0)
    rotated: Sequence[int] | None = config.get("no_rope_layers")
    interval = config.get("no_rope_layer_interval", 4)
    if rotated is None:
        return {"no_rope_freq": interval}
    rotated = [int(bool(value)) for value in rotated[:layers]]
    if all(rotated):
        return {"no_rope_freq": None}
    every = rotated.index(0) + 1
    if rotated != [int((layer + 1) % every != 0) for layer in range(layers)]:
        raise MismatchError(
            f"no_rope_layers is {rotated}: expected a 0, for a layer without positions, at a regular interval from the "
            "start, such as in every fourth layer"
        )
    return {"no_rope_freq": every}


def _keys(shape: ModelShape) -> dict[str, Any]:
    every = shape.no_rope_freq
    rotated = [int(every is None or (layer + 1) % every != 0) for layer in range(shape.num_layers)]
    return {"no_rope_layers": rotated} | ({} if every is None else {"no_rope_layer_interval": every})


def _window(config: Mapping[str, Any]) -> int | None:
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    window: int | None = config.get("sliding_window")
    return window if types is None or "sliding_attention" in types else None


SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    rows=(*EMBEDDING_AND_HEAD, *ATTENTION, *FEED_FORWARD),
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "num_key_value_heads": 4,
    },
    default_rope_theta=2000000.0,
    expected={
        "attention_bias": ((False,), "a bias in the attention's output too, which layers here lack"),
        "mlp_bias": ((False,), "biases in the feed-forward layers, which layers here lack"),
    },
    values=_values,
    window=_window,
    keys=_keys,
    fixed={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    optional=frozenset({"no_rope_freq", "sliding_window"}),
)

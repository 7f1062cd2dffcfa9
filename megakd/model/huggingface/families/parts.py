"""Rows that families share: embedding, attention, biases and norms of queries and keys, feed-forward layers."""

from __future__ import annotations

from megakd.model.huggingface.families.table import TensorRow

_THEIRS, _OURS = "model.layers.{layer}.", "decoder.layers.{layer}."
_QKV = _OURS + "self_attention.linear_qkv."
_FC1, _FC2 = _OURS + "mlp.linear_fc1.", _OURS + "mlp.linear_fc2."
_EXPERTS = _OURS + "mlp.experts.experts."

EMBEDDING_AND_HEAD = (
    TensorRow("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocabulary", ("vocabulary", "hidden")),
    TensorRow("model.norm.weight", "decoder.final_layernorm.weight", "whole", ("hidden",)),
    TensorRow("lm_head.weight", "output_layer.weight", "vocabulary", ("vocabulary", "hidden"), when="untied"),
)
ATTENTION = (
    TensorRow(_THEIRS + "input_layernorm.weight", _QKV + "layer_norm_weight", "whole", ("hidden",)),
    TensorRow(_THEIRS + "self_attn.q_proj.weight", _QKV + "weight", "query", ("query", "hidden")),
    TensorRow(_THEIRS + "self_attn.k_proj.weight", _QKV + "weight", "key", ("key", "hidden")),
    TensorRow(_THEIRS + "self_attn.v_proj.weight", _QKV + "weight", "value", ("key", "hidden")),
    TensorRow(
        _THEIRS + "self_attn.o_proj.weight",
        _OURS + "self_attention.linear_proj.weight",
        "whole",
        ("hidden", "query"),
    ),
)
QKV_BIAS = (
    TensorRow(_THEIRS + "self_attn.q_proj.bias", _QKV + "bias", "query", ("query",)),
    TensorRow(_THEIRS + "self_attn.k_proj.bias", _QKV + "bias", "key", ("key",)),
    TensorRow(_THEIRS + "self_attn.v_proj.bias", _QKV + "bias", "value", ("key",)),
)
QK_NORM = (
    TensorRow(_THEIRS + "self_attn.q_norm.weight", _OURS + "self_attention.q_layernorm.weight", "whole", ("head",)),
    TensorRow(_THEIRS + "self_attn.k_norm.weight", _OURS + "self_attention.k_layernorm.weight", "whole", ("head",)),
)
_NORM_BEFORE_FEED_FORWARD = TensorRow(
    _THEIRS + "post_attention_layernorm.weight", _FC1 + "layer_norm_weight", "whole", ("hidden",)
)
FEED_FORWARD = (
    _NORM_BEFORE_FEED_FORWARD,
    TensorRow(_THEIRS + "mlp.gate_proj.weight", _FC1 + "weight", "gate", ("ffn", "hidden")),
    TensorRow(_THEIRS + "mlp.up_proj.weight", _FC1 + "weight", "up", ("ffn", "hidden")),
    TensorRow(_THEIRS + "mlp.down_proj.weight", _FC2 + "weight", "whole", ("hidden", "ffn")),
)


def experts(*, block: str, gate: str, up: str, down: str) -> tuple[TensorRow, ...]:
    """Return the rows of a feed-forward layer of experts, by its names of the block and of an expert's matrices."""
    theirs = _THEIRS + block + "."
    expert = theirs + "experts.{expert}."
    return (
        _NORM_BEFORE_FEED_FORWARD,
        TensorRow(theirs + "gate.weight", _OURS + "mlp.router.weight", "whole", ("experts", "hidden")),
        TensorRow(f"{expert}{gate}.weight", _EXPERTS + "linear_fc1.weight", "gate", ("expert_ffn", "hidden")),
        TensorRow(f"{expert}{up}.weight", _EXPERTS + "linear_fc1.weight", "up", ("expert_ffn", "hidden")),
        TensorRow(f"{expert}{down}.weight", _EXPERTS + "linear_fc2.weight", "whole", ("hidden", "expert_ffn")),
    )

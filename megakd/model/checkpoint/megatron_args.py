"""Model of a checkpoint of Megatron-LM, from the arguments that the checkpoint keeps. No torch.

Megatron-LM saves the ``argparse.Namespace`` of the run in ``common.pt``. A field that is missing, because the version
is older, means what the older code did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megakd.errors import MismatchError
from megakd.model.checkpoint.plain_pickle import Named
from megakd.model.config import ModelConfig

# field -> the values that the models here have, and the meaning of any other value
_EXPECTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalization": (("RMSNorm",), "norms with a mean and a bias"),
    "apply_layernorm_1p": ((False,), "norms with weights around 0"),
    "add_bias_linear": ((False,), "biases in linear layers (only QKV may have one)"),
    "swiglu": ((True,), "a feed-forward layer without SwiGLU's gate"),
    "squared_relu": ((False,), "another activation"),
    "quick_geglu": ((False,), "another activation"),
    "glu_linear_offset": ((0,), "an offset in the gate"),
    "activation_func_clamp_value": ((None,), "a clamped activation"),
    "position_embedding_type": (("rope",), "positions other than rotary ones"),
    "rotary_interleaved": ((False,), "rotary pairs side by side"),
    "rotary_seq_len_interpolation_factor": ((None, 1), "interpolated positions"),
    "no_rope_freq": ((None,), "layers without positions"),
    "apply_residual_connection_post_layernorm": ((False,), "residuals after the norm"),
    "multi_latent_attention": ((False,), "latent attention"),
    "experimental_attention_variant": ((None,), "another attention"),
    "linear_attention_freq": ((None,), "layers of linear attention"),
    "attention_output_gate": ((False,), "gated attention"),
    "softmax_type": (("vanilla",), "attention with a sink"),
    "window_size": ((None,), "sliding windows"),
    "qk_l2_norm": ((False,), "another norm of queries and keys"),
    "heterogeneous_layers_config_path": ((None,), "layers that differ"),
    "heterogeneous_layers_config_encoded_json": ((None,), "layers that differ"),
    "is_hybrid_model": ((False,), "state-space layers"),
    "hybrid_override_pattern": ((None,), "state-space layers"),
    "hybrid_layer_pattern": ((None,), "state-space layers"),
    "spec": ((None,), "layers of another specification"),
    "retro_add_retriever": ((False,), "a retriever"),
    "use_mup": ((False,), "scaled embeddings and logits"),
}
_EXPECTED_OF_EXPERTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_layer_freq": ((1, "1", [1]), "dense layers between those of experts"),
    "moe_router_load_balancing_type": (("aux_loss", "seq_aux_loss", "global_aux_loss", "none"), "another routing"),
    "moe_router_score_function": (("softmax",), "another score of experts"),
    "moe_router_pre_softmax": ((False,), "a softmax over all experts"),
    "moe_router_topk_scaling_factor": ((None, 1.0), "scaled expert weights"),
    "moe_router_enable_expert_bias": ((False,), "a bias of experts"),
    "moe_router_num_groups": ((None,), "groups of experts"),
    "moe_apply_probs_on_input": ((False,), "weighted inputs of experts"),
    "moe_shared_expert_gate": ((False,), "a gated shared expert"),
    "moe_latent_size": ((None,), "experts in a latent space"),
}


def model_of_args(args: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]], *, role: str) -> ModelConfig:
    """Return the model that ``args`` describe.

    sizes: of the weights, by the names of this project without layer numbers; they tell what older versions do not
    record.

    Raises:
        MismatchError: names every field with a value that the models here do not have, and its meaning.
    """
    expected = _EXPECTED | (_EXPECTED_OF_EXPERTS if args.get("num_experts") else {})
    if args.get("use_rotary_position_embeddings"):  # the older spelling
        expected.pop("position_embedding_type")
    wrong = [
        f"{field} is {_plain(args[field])!r}, expected {' or '.join(map(repr, accepted))}: {meaning}"
        for field, (accepted, meaning) in expected.items()
        if field in args and _plain(args[field]) not in accepted and not (args[field] is None and False in accepted)
    ]
    if wrong:
        raise MismatchError(f"{role}: a model of Megatron-LM that megakd does not run: {'; '.join(wrong)}")
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not args.get(name)]
    if missing:
        raise MismatchError(f"{role}: the arguments of Megatron-LM in it do not tell {', '.join(missing)}")
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    channels = args.get("kv_channels") or hidden // heads
    qkv_rows = sizes.get("decoder.layers.self_attention.linear_qkv.weight", (0, 0))[-2]
    experts = {
        name: args[name]
        for name in ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        if args.get("num_experts") and args.get(name) is not None
    }
    gate_rows = sizes.get("decoder.layers.mlp.linear_fc1.weight", (0, 0))[-2]
    return ModelConfig(
        num_layers=args["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=args.get("ffn_hidden_size") or gate_rows // 2 or None,
        num_attention_heads=heads,
        num_query_groups=(qkv_rows // channels - heads) // 2 or None,
        kv_channels=channels,
        norm_epsilon=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
        add_qkv_bias="decoder.layers.self_attention.linear_qkv.bias" in sizes,
        qk_layernorm="decoder.layers.self_attention.q_layernorm.weight" in sizes,
        rotary_base=float(args.get("rotary_base") or 10000),
        rotary_percent=args.get("rotary_percent", 1.0),
        rope_scaling_factor=float(args.get("rope_scaling_factor", 8.0)) if args.get("use_rope_scaling") else None,
        untie_embeddings_and_output_weights="output_layer.weight" in sizes,
        make_vocab_size_divisible_by=args.get("make_vocab_size_divisible_by") or 128,
        num_experts=args.get("num_experts") or None,
        bf16=bool(args.get("bf16", False)),
        **experts,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list) and len(set(map(repr, value))) == 1:
        return value[:1]  # the same for every layer
    return repr(value) if isinstance(value, Named) else value

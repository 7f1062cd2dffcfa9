"""``config.json`` and ``generation_config.json`` of a model, for transformers 4 and 5 side by side. No torch.

What a folder that the model was imported from said, and our shape does not, is kept as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megakd.errors import MismatchError
from megakd.model.config import ModelShape
from megakd.model.huggingface.families.by_model_type import FAMILIES
from megakd.model.huggingface.families.table import Family
from megakd.model.huggingface.rope_parameters import flat_parameters, rope_values

# of a folder that was imported: what it said of code, of files elsewhere and of the program that wrote it
_NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "quantization_config", "torch_dtype", "dtype")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# of a shape, what has no effect on what the model computes, or is in no config.json
_NOT_COMPARED = {
    "ffn_hidden_size", "normalization", "init_method_std", "hidden_dropout", "attention_dropout",
    "make_vocab_size_divisible_by", "padded_vocab_size", "moe_token_dispatcher_type", "moe_aux_loss_coeff",
    "transformer_impl", "bf16", "fp8_format", "fp8_recipe", "fp8_param_gather", "fp4_format", "first_last_layers_bf16",
    "recompute_granularity", "recompute_method", "recompute_num_layers", "fp8_margin", "fp8_amax_history_len",
    "fp8_amax_compute_algo",
}  # fmt: skip
_OF_DENSE_MODELS, _OF_EXPERTS = (
    {"ffn_hidden_size"},
    {"moe_router_topk", "moe_ffn_hidden_size", "moe_router_pre_softmax"},
)


def choose_family(shape: ModelShape, wanted: str | None, what: str) -> Family:
    """Return the family that has the weights of ``shape`` and computes the same; ``wanted`` if it does.

    wanted: the model_type of the folder that the model came from.

    Raises:
        MismatchError: no family does; names the fields of the shape and their values.
    """
    names = weight_names(shape)
    reasons = []
    for family in sorted(FAMILIES.values(), key=lambda family: family.model_type != wanted):
        if {stacked_name(tensor.ours)[0] for tensor in family.tensors(shape, 1)} != names:
            continue
        reason = family.lacks(shape)
        if reason is None:
            return family
        reasons.append(f"{family.model_type}: {reason}")
    weights = [
        f"{name} is {getattr(shape, name)}"
        for name in ("add_qkv_bias", "qk_layernorm", "num_experts", "moe_shared_expert_intermediate_size")
        if getattr(shape, name)
    ]
    told = "; ".join(reasons) or (f"{', '.join(weights)}: no family has these weights together")
    raise MismatchError(f"{what}: a model that no family of Hugging Face's here can hold: {told}")


def config_of(
    shape: ModelShape,
    family: Family,
    *,
    rows: int,
    dtype: str,
    max_position_embeddings: int,
    eos_token_id: int | None,
    recorded: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of ``config.json``.

    rows: of the embedding. dtype: of the weights, as in ``bfloat16``. eos_token_id: used where nothing is recorded.
    recorded: ``config.json`` of the folder that the model was imported from; None for a model that was trained here.
    """
    kept = {key: value for key, value in (recorded or {}).items() if key not in _NOT_KEPT}
    if kept.get("model_type") != family.model_type:
        kept = {key: kept[key] for key in _TOKENS if key in kept}
    if len(kept.get("layer_types") or ()) != shape.num_layers:
        kept.pop("layer_types", None)
    rope = _rope_parameters(shape)
    if recorded is not None and "model_type" in kept and _mean_the_same(rope, recorded, family):
        rope = flat_parameters(recorded, theta=family.default_rope_theta)  # in the words of the folder
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    tokens = dict.fromkeys(_TOKENS) | {"eos_token_id": eos_token_id}
    names = {"architectures": [family.architecture], "model_type": family.model_type}
    sizes = {
        **names,
        "vocab_size": rows,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "rms_norm_eps": shape.norm_epsilon,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        "rope_theta": shape.rotary_base,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    defaults = {
        "hidden_act": "silu",
        "intermediate_size": shape.ffn_hidden_size,
        "initializer_range": shape.init_method_std,
        "use_cache": True,
    }
    if shape.num_experts is None:
        sizes["intermediate_size"] = shape.ffn_hidden_size
    return {**names, **defaults, **tokens, **family.fixed, **kept, **sizes, **family.keys(shape)}


def generation_config_of(config: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the content of ``generation_config.json``: as it was in the folder, else the tokens of ``config``."""
    if recorded is not None:
        return dict(recorded)
    tokens = {key: config[key] for key in _TOKENS if config.get(key) is not None}
    return {"_from_model_config": True, **tokens}


def check_shape(shape: ModelShape, read_back: ModelShape, what: str) -> None:
    """Refuse a ``config.json`` that means another model than ``shape``. read_back: the model that it is read as.

    Raises:
        MismatchError: names every field with both values.
    """
    ours, theirs = asdict(shape), asdict(read_back)
    skipped = _NOT_COMPARED | {"max_position_embeddings"}
    skipped = skipped - _OF_DENSE_MODELS | _OF_EXPERTS if shape.num_experts is None else skipped
    skipped |= {name for name in ours if name.startswith(_unused_scalings(shape))}
    wrong = [
        f"{name} is {ours[name]} in the checkpoint, and would be {theirs[name]}"
        for name in ours
        if name not in skipped and ours[name] != theirs[name]
    ]
    if wrong:
        raise MismatchError(f"{what}: its config.json cannot say what the model computes: {'; '.join(wrong)}")


def stacked_name(name: str) -> tuple[str, int | None]:
    """Return the name of a weight in a checkpoint, where layers are stacked, and the number of its layer."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    return (name, None) if match is None else (f"decoder.layers.{match[2]}", int(match[1]))


def weight_names(shape: ModelShape) -> set[str]:
    """Return the names of all weights in a checkpoint of ``shape``, those of experts included."""
    experts = ["linear_fc1.layer_norm_weight", "router.weight"]
    experts += [f"experts.experts.{matrix}.weight" for matrix in ("linear_fc1", "linear_fc2")]
    if shape.moe_shared_expert_intermediate_size:
        experts += [f"shared_experts.{matrix}.weight" for matrix in ("linear_fc1", "linear_fc2")]
    return shape.weight_names() | ({f"decoder.layers.mlp.{name}" for name in experts} if shape.num_experts else set())


def _unused_scalings(shape: ModelShape) -> tuple[str, ...]:
    """Return beginnings of the options that change nothing, because another scaling of positions, or none, is used."""
    prefixes = {"rope_scaling_factor": "rope_scaling_", "yarn_rotary_scaling_factor": "yarn_"}
    return tuple(prefix for option, prefix in prefixes.items() if getattr(shape, option) is None)


def _mean_the_same(rope: Mapping[str, Any], recorded: Mapping[str, Any], family: Family) -> bool:
    """Return whether rotary positions are those of the folder that the model came from."""
    theta = family.default_rope_theta
    return rope_values({"rope_parameters": rope}, theta=theta) == rope_values(
        {**family.defaults, **recorded}, theta=theta
    )


def _rope_parameters(shape: ModelShape) -> dict[str, Any]:
    """Return the rotary positions in the form of transformers 5, the inverse of `rope_parameters.rope_values`."""
    parameters: dict[str, Any] = {"rope_type": "default"}
    if shape.rotary_seq_len_interpolation_factor is not None:
        parameters = {"rope_type": "linear", "factor": shape.rotary_seq_len_interpolation_factor}
    if shape.rope_scaling_factor is not None:
        parameters = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling_factor,
            "low_freq_factor": shape.rope_scaling_low_freq_factor,
            "high_freq_factor": shape.rope_scaling_high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling_original_max_position_embeddings,
        }
    if shape.yarn_rotary_scaling_factor is not None:
        parameters = {
            "rope_type": "yarn",
            "factor": shape.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": shape.yarn_original_max_position_embeddings,
            "beta_fast": shape.yarn_beta_fast,
            "beta_slow": shape.yarn_beta_slow,
            "truncate": shape.yarn_correction_range_round_to_int,
        }
        if shape.yarn_attention_factor is not None:
            parameters["attention_factor"] = shape.yarn_attention_factor
    return {**parameters, "rope_theta": shape.rotary_base}

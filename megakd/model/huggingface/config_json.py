"""``config.json`` of transformers 4 and 5, read as a model's shape or refused, field by field. No torch.

The file itself is read, never transformers' classes, and no code that it names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakd.config.tree import validate
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.model.config import ModelConfig, ModelShape
from megakd.model.huggingface.families.by_model_type import FAMILIES
from megakd.model.huggingface.families.table import Family
from megakd.model.huggingface.rope_parameters import rope_values

CONFIG = "config.json"
# key -> the values that models here have, and the meaning of any other one; keys may be absent
_EXPECTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "another activation than SwiGLU's"),
    "partial_rotary_factor": ((None, 1, 1.0), "a part of the head without positions, which the family does not have"),
    "quantization_config": ((None,), "quantised weights; convert them to bfloat16 first"),
    "final_logit_softcapping": ((None,), "capped logits"),
    "attn_logit_softcapping": ((None,), "capped attention scores"),
    "query_pre_attn_scalar": ((None,), "another scale of attention scores"),
    "attention_multiplier": ((None, 1, 1.0), "another scale of attention scores"),
    "embedding_multiplier": ((None, 1, 1.0), "scaled embeddings"),
    "residual_multiplier": ((None, 1, 1.0), "scaled residuals"),
    "logits_scaling": ((None, 1, 1.0), "scaled logits"),
    "logit_scale": ((None, 1, 1.0), "scaled logits"),
    "add_cross_attention": ((None, False), "attention to another sequence"),
    "is_encoder_decoder": ((None, False), "an encoder"),
    "attention_chunk_size": ((None,), "attention in chunks"),
    "num_nextn_predict_layers": ((None, 0), "layers that predict further tokens"),
    "pruned_heads": ((None, {}), "pruned heads"),
}
_DTYPES = {"bfloat16": True, "float32": False, "float16": False, "auto": False}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NULLS = {"sliding_window", "head_dim", "num_key_value_heads"}  # null has a meaning of its own, not the default's
_OBJECTS, _LISTS = ("rope_parameters", "rope_scaling"), ("layer_types", "no_rope_layers", "mlp_only_layers")
_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class HfModel:
    """A model as its ``config.json`` describes it.

    shape: without what only the tensors tell; ``bf16`` is the configured type. rows: of the embedding, padding among
    them. tied_is_explicit: the file says whether head and embedding are one, which else is the class's default.
    config: the whole file.
    """

    path: Path
    family: Family
    shape: ModelShape
    rows: int
    tied_is_explicit: bool
    config: Mapping[str, Any]


def read_config_json(folder: Path, role: str) -> HfModel:
    """Read the model that ``folder/config.json`` describes.

    Raises:
        CorruptError: the file is not a JSON object. MismatchError: names every field whose value models here do not
            have, and its meaning. UsageError: a size is missing or cannot be.
    """
    path = folder / CONFIG
    return understand_config(read_json(path), path, f"{role}: {path}")


def understand_config(written: Mapping[str, Any], path: Path, what: str) -> HfModel:
    """Return the model that the content of a ``config.json`` describes. what: begins messages.

    Raises:
        CorruptError, MismatchError, UsageError: as `read_config_json` does.
    """
    config = written
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise MismatchError(f"{what}: model_type is {model_type!r}; expected one of {', '.join(FAMILIES)}")
    _refuse_other_forms(config, what)
    _refuse_code(config, what)
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise MismatchError(
            f"{what}: architectures is {architectures}; expected [{family.architecture!r}]: another head than that of "
            "a language model"
        )
    _refuse_unknown(config, family, what)
    config = {**family.defaults, **{key: value for key, value in config.items() if value is not None or key in _NULLS}}
    missing = [key for key in _SIZES if not _is_count(config.get(key))]
    if missing:
        raise UsageError(
            f"{what}: {', '.join(f'{key} is {config.get(key)!r}' for key in missing)}; expected a positive number"
        )
    return HfModel(
        path=path,
        family=family,
        shape=_shape(config, family, what),
        rows=config["vocab_size"],
        tied_is_explicit=written.get("tie_word_embeddings") is not None,
        config=written,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises CorruptError."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CorruptError(f"{path} holds no JSON object but a {type(content).__name__}")
    return content


def _shape(config: Mapping[str, Any], family: Family, what: str) -> ModelShape:
    heads = config["num_attention_heads"]
    window = family.window(config)
    try:
        values = family.values(config) | rope_values(config, theta=family.default_rope_theta)
        model = ModelConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            norm_epsilon=float(config["rms_norm_eps"]),
            untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
            init_method_std=float(config["initializer_range"] or 0.02),
            attention_dropout=float(config.get("attention_dropout") or 0.0),
            bf16=_DTYPES[_dtype(config)],
            **values,
        )
        validate(model)
        return dataclasses.replace(
            model.resolve("the model"),
            max_position_embeddings=_count(config, "max_position_embeddings"),
            sliding_window=None if window is None else _count({"sliding_window": window}, "sliding_window"),
            padded_vocab_size=config["vocab_size"],
        )
    except (MismatchError, UsageError) as error:
        raise type(error)(f"{what}: {error}") from None
    except (TypeError, ValueError) as error:
        raise CorruptError(f"{what}: a value has another type than transformers writes: {error}") from None


def _refuse_other_forms(config: Mapping[str, Any], what: str) -> None:
    """Refuse values that are no object, list or number where transformers writes one. Raises CorruptError."""
    wrong = [
        f"{key} is {config[key]!r}, expected {form}"
        for keys, kind, form in ((_OBJECTS, Mapping, "an object"), (_LISTS, list, "a list"))
        for key in keys
        if config.get(key) is not None and not isinstance(config[key], kind)
    ]
    wrong += [
        f"{key} is {config[key]!r}, expected a positive number"
        for key in _EXPERTS
        if config.get(key) is not None and not _is_count(config[key])
    ]
    if wrong:
        raise CorruptError(f"{what}: {'; '.join(wrong)}: not as transformers writes it")


def _refuse_code(config: Mapping[str, Any], what: str) -> None:
    code = config.get("auto_map") or {}
    named = code.get("AutoModelForCausalLM") if isinstance(code, dict) else code
    if named:
        raise MismatchError(
            f"{what}: auto_map names {named}: the model is computed by code of its own, which megakd does not run; if "
            "the family's own class computes the same, remove auto_map"
        )


def _refuse_unknown(config: Mapping[str, Any], family: Family, what: str) -> None:
    """Refuse the values of fields that mean another model than those here."""
    expected = {**_EXPECTED, **family.expected}
    wrong = [
        f"{key} is {config[key]!r}, expected {' or '.join(map(repr, values))}: {meaning}"
        for key, (values, meaning) in expected.items()
        if key in config and config[key] not in values
    ]
    types = config.get("layer_types") or []
    if unknown := sorted({str(kind) for kind in types} - _LAYER_TYPES):
        wrong.append(f"layer_types has {', '.join(unknown)}, expected {' or '.join(sorted(_LAYER_TYPES))}")
    if _dtype(config) not in _DTYPES:
        wrong.append(f"dtype is {_dtype(config)!r}, expected {' or '.join(_DTYPES)}")
    if wrong:
        raise MismatchError(f"{what}: a model that megakd does not compute: {'; '.join(wrong)}")


def _dtype(config: Mapping[str, Any]) -> str:
    """Return the type of the weights; transformers 4 calls it ``torch_dtype``."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _count(config: Mapping[str, Any], key: str) -> int:
    if not _is_count(config[key]):
        raise UsageError(f"{key} is {config[key]!r}; expected a positive number")
    return int(config[key])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1

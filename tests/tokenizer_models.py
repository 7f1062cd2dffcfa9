"""Small tokenizer models, trained where they are needed because the suite has no network and stores no binaries."""

from __future__ import annotations

import io
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

from megakd.data.tokenizers.probe import build_probe

BPE_RULES = {
    "gpt2": None,
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    ),
}
"""How byte-level tokenizers of well-known families cut text; None: as the package does by itself."""


def text_lines() -> list[str]:
    """English text that every Python carries."""
    return [line for topic in sorted(pydoc_data.topics.topics) for line in pydoc_data.topics.topics[topic].split("\n")]


def train_sentencepiece(path: Path, *, vocab_size: int = 600, normalization: str = "identity") -> Path:
    """Write a BPE model with byte fallback."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text_lines() if line.strip()][:4000]),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def train_byte_bpe(folder: Path, *, vocab_size: int = 600) -> Path:
    """Write a folder as transformers saves one: tokenizer.json with a byte-level BPE, and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_lines()[:4000], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    return folder


def write_telling_bpe(folder: Path, rule: str, *, normaliser: dict[str, Any] | None = None) -> Path:
    """Write a byte-level BPE with this rule of cutting text whose ids show every cut."""
    pieces: list[dict[str, Any]] = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}]
    pattern = BPE_RULES[rule]
    pieces[0]["use_regex"] = pattern is None
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        pieces.insert(0, split)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normaliser,
        "pre_tokenizer": pieces[0] if pattern is None else {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    probe = build_probe(json.dumps(content).encode())
    assert probe is not None
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(probe)
    return folder

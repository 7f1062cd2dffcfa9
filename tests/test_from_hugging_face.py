"""From a Hugging Face folder to one: every command of the page, in order, with a tiny random teacher and less text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pages import DOCS, blocks_of, run_block
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd.run_folder.record import read_run

SHORTER = {
    "num_layers: 10, hidden_size: 256": "num_layers: 2, hidden_size: 32",
    "train_iters: 400": "train_iters: 3",
    "--train-iters 100": "--train-iters 2",
    "--hidden-size 128": "--hidden-size 16",
    "lr_warmup_iters: 20": "lr_warmup_iters: 1",
    "eval_interval: 100": "eval_interval: 3",
    "--save-interval 200 --hf-export-interval 400": "--save-interval 3 --hf-export-interval 3",
    "seq_length: 256": "seq_length: 64",
    "--seq-length 256": "--seq-length 64",
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_command_in_order(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_teacher(tmp_path)
    for block in blocks_of("from_hugging_face.md", SHORTER):
        run_block(block, tmp_path)
    assert len(read_run(tmp_path / "runs" / "student", flag="").steps) == 3
    teacher, student = tmp_path / "SmolLM2-135M", tmp_path / "hf" / "student"
    assert (student / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    (beside,) = (tmp_path / "runs" / "student").rglob("*.safetensors")
    weights = AutoModelForCausalLM.from_pretrained(student).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(beside.parent).state_dict().items():
        assert torch.equal(weight, weights[name]), name
    (results,) = (tmp_path / "runs" / "student").rglob("evaluate/*.json")
    found = json.loads(results.read_text())["held_out"]
    assert found["bits_per_byte"] > 0
    assert found["teacher"]["kl_divergence"] > 0
    assert AutoTokenizer.from_pretrained(student)("import os")["input_ids"]


def write_text(folder: Path) -> None:
    """Write 20 and 3 documents: pages of the documentation, cut into pieces."""
    text = "\n".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    for part, first, count in (("train", 0, 20), ("valid", 20, 3)):
        file = folder / "text" / part / "docs.jsonl"
        file.parent.mkdir(parents=True)
        pieces = [text[at * 1500 : (at + 1) * 1500] for at in range(first, first + count)]
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))


def write_teacher(folder: Path) -> None:
    """Write a random Llama of 2 layers with a byte-level tokenizer of 400 pieces, as transformers writes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((folder / "text" / "train" / "docs.jsonl").read_text().splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder / "SmolLM2-135M")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "SmolLM2-135M")

"""A Hugging Face folder cut, exported and read by transformers: its loss, and its text by ``megakd generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model.huggingface.exports import tensors_of
from model.huggingface.folders import Case, write_folder
from model.huggingface.test_export import export_of
from model.huggingface.test_load_everywhere import IDS, ROWS, SEQ, write_tokenizer
from pipeline.generate.test_generate_verb import records, run_verb
from pipeline.prune.prune_runs import prune, report_of
from runs import write_dataset
from worlds import Worlds

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.tokenizer import build_tokenizer
from megakd.pipeline.prune.preflight import draw_calibration

COUNT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher with more rows than its tokenizer has ids, and a dataset."""
    root = tmp_path_factory.mktemp("prune-hf")
    teacher = root / "teacher"
    write_folder(teacher, Case("qwen2", 4, {"vocab_size": ROWS, "tie_word_embeddings": True}))
    write_tokenizer(teacher)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", teacher, eod_token="<|endoftext|>")
    return {"teacher": teacher, "data": write_dataset(root / "data", tokenizer=tokenizer.describe())}


def cut(made: dict[str, Any], world: Worlds, save: Path, *flags: str) -> None:
    words = ("--load", str(made["teacher"]), "--save", str(save), "--data-path", made["data"], "--seq-length", str(SEQ))
    ((status, _, err),) = world(1).run(prune, *words, "--calibration-samples", str(COUNT), *flags)
    assert status == 0, err


@pytest.mark.slow
def test_a_student_of_a_folder_is_what_transformers_reads(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    cut(made, world, tmp_path / "cut", "--num-layers", "3", "--hidden-size", "20", "--ffn-hidden-size", "33",
        "--num-attention-heads", "2", "--num-query-groups", "1")  # fmt: skip
    folder = export_of(tmp_path / "cut", tmp_path / "exported")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (3, 20, 33)
    stream, losses = IndexedDataset(made["data"]).tokens, []
    for sample in draw_calibration((len(stream) - 1) // SEQ, count=COUNT, seed=1234).tolist():
        row = torch.from_numpy(stream[sample * SEQ : sample * SEQ + SEQ + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0, :, :IDS]
        losses.append(float(torch.nn.functional.cross_entropy(logits, row[1:])))
    assert report_of(tmp_path / "cut")["loss"]["student"] == pytest.approx(np.mean(losses), rel=1e-5)

    prompts = ["w3w14", "w15"]
    words = ("--load", str(folder), "--output", str(tmp_path / "texts"), "--num-tokens-to-generate", "20")
    ((status, _, err),) = world(1).run(run_verb, *words, "--prompt", *prompts, "--ignore-eod")
    assert status == 0, err
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    for prompt, record in zip(prompts, records(tmp_path / "texts"), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "eos_token_id": None}
        bad = [[token] for token in range(IDS, ROWS)]  # rows of padding
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), bad_words_ids=bad, **settings)
        assert record["tokens"] == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_full_size_gives_back_the_folder(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    cut(made, world, tmp_path / "cut")
    folder = export_of(tmp_path / "cut", tmp_path / "exported")
    assert tensors_of(folder) == tensors_of(made["teacher"])
    kept = json.loads((made["teacher"] / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in kept if key in config} == {key: kept[key] for key in kept if key in config}

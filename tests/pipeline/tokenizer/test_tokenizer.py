"""tokenizer: a model of text alone, whole or absent, the same every time, which preprocess takes; it loses nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer_models import text_lines

from megakd.artefacts.manifest import read_manifest, verify_files
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.text.inputs import find_inputs
from megakd.data.tokenizer import build_tokenizer
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import DataBudgetError, UsageError
from megakd.pipeline.preprocess import main as preprocess
from megakd.pipeline.tokenizer.main import _stretches, main

TYPES = {
    "byte-bpe": "HuggingFaceTokenizer",
    "sentencepiece-bpe": "SentencePieceTokenizer",
    "sentencepiece-unigram": "SentencePieceTokenizer",
}
HARD = ["  two\n\n\tlines \r\n", "na\u00efve \u4e2d\u6587 \U0001f469\u200d\U0001f467 e\u0301 \ufb01", "1234567 x=0"]
HARD += ["\ufeff\u00a0\u3000a", " ", "\n", "a\x00b"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    lines = text_lines()[:3000]
    documents = ["\n".join(lines[start : start + 20]) for start in range(0, len(lines), 20)]
    path.write_text("".join(json.dumps({"text": text, "title": "a b"}) + "\n" for text in documents))
    return path


def run(corpus: Path | str, out: Path, *flags: str) -> int:
    return main(["--input", str(corpus), "--output", str(out), "--vocab-size", "700", *flags])


@pytest.mark.parametrize("kind", TYPES)
def test_a_new_tokenizer_loses_nothing_and_preprocess_takes_it(kind: str, corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path / "t", "--type", kind, "--special-tokens", "<|user|>") == 0
    tokenizer = build_tokenizer(TYPES[kind], tmp_path / "t")  # type: ignore[arg-type]
    assert tokenizer.vocab_size == 700 and tokenizer.eod_token == "<|endoftext|>" and "<|user|>" in tokenizer.literals
    sizes = tokenizer.token_bytes()
    for text in HARD + text_lines()[:300]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and sizes[ids].sum() == len(text.encode()), ascii(text)
    flags = ["--tokenizer-type", TYPES[kind], "--tokenizer-model", str(tmp_path / "t"), "--append-eod"]
    flags += ["--tokenizer-engine", "reference", "--input", str(corpus), "--output-prefix", str(tmp_path / "o")]
    assert preprocess.main(flags) == 0
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert open_tokenizer(dataset).hash == tokenizer.hash and dataset.document(0)[-1] == tokenizer.eod
    manifest = read_manifest(tmp_path / "t/tokenizer.manifest.json", format="tokenizer", version=1)
    assert manifest.parameters["sample"]["texts"] == 150 and not verify_files(manifest.path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("t")) == ["t"]


def test_the_same_text_gives_the_same_files_however_it_is_packed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes(), mtime=0))
    for name, path in (("one", corpus), ("two", corpus), ("three", tmp_path / "a.jsonl.gz")):
        assert run(path, tmp_path / name) == 0
        assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / name / "tokenizer.json").read_bytes()


def test_digits_may_be_tokens_of_their_own(corpus: Path, tmp_path: Path) -> None:
    for kind in ("byte-bpe", "sentencepiece-bpe"):
        assert run(corpus, tmp_path / kind, "--split-digits", "--type", kind) == 0
        tokenizer = build_tokenizer(TYPES[kind], tmp_path / kind)  # type: ignore[arg-type]
        assert len(tokenizer.encode("2024")) >= 4


def test_the_folder_of_the_output_is_made(corpus: Path, tmp_path: Path) -> None:
    assert run(corpus, tmp_path / "tokenizers/own") == 0
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizers/own").vocab_size == 700


def test_what_is_there_is_left_alone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus, tmp_path / "t") == 0
    before = (tmp_path / "t/tokenizer.json").stat().st_mtime_ns
    assert run(corpus, tmp_path / "t") == 0
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(UsageError, match="made otherwise: type: byte-bpe there, sentencepiece-bpe here"):
        run(corpus, tmp_path / "t", "--type", "sentencepiece-bpe")
    (tmp_path / "b.jsonl").write_bytes(corpus.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(UsageError, match="sample"):
        run(tmp_path / "b.jsonl", tmp_path / "t")
    assert (tmp_path / "t/tokenizer.json").stat().st_mtime_ns == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own/tokenizer.json").write_text("mine")
    with pytest.raises(UsageError, match="no tokenizer of this command"):
        run(corpus, tmp_path / "own")
    (tmp_path / "empty").mkdir()
    assert run(corpus, tmp_path / "empty") == 0 and (tmp_path / "empty/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vocab-size", "200"), "expected at least 258"),
        (("--vocab-size", "900000"), "--vocab-size 900000"),
        (("--vocab-size", "900000", "--type", "sentencepiece-bpe"), "--vocab-size 900000: sentencepiece: "),
        (("--special-tokens", "<|endoftext|>"), "different"),
        (("--max-bytes", "0"), "max-bytes"),
        (("--json-keys", "nothing"), "150 of 150 records are bad.*byte 0: missing key"),
        (("--type", "wordpiece"), "wordpiece"),
        (("--output", "/dev/null/t"), "/dev/null is not a folder"),
    ],
)
def test_what_cannot_work_is_refused(flags: tuple[str, ...], words: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises((UsageError, DataBudgetError), match=words):
        run(corpus, tmp_path / "t", *flags)
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob("t.*"))


def test_large_inputs_are_sampled_all_over(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakd.pipeline.tokenizer.main._STRETCH_BYTES", 5000)
    assert run(corpus, tmp_path / "t", "--max-bytes", "50000", "--vocab-size", "300") == 0
    sample: Any = read_manifest(tmp_path / "t/tokenizer.manifest.json").parameters["sample"]
    assert 30_000 < sample["bytes"] < 75_000
    starts = [start for _, start, _ in _stretches(find_inputs([str(corpus)], own=""), 50_000)]
    assert len(starts) == 10 and np.ptp(np.diff(starts)) <= 1 and starts[-1] > 0.8 * corpus.stat().st_size

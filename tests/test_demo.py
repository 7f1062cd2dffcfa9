"""The demo's own parts: its corpus and its report. Whole runs are what `make demo` is for."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_corpus_is_split_by_file_the_same_every_time() -> None:
    corpus = load("corpus")
    documents = list(corpus.documents())
    names = [document.name for document in documents]
    assert names == [document.name for document in corpus.documents()]
    assert len(set(names)) == len(names) and len({document.text for document in documents}) == len(documents)
    share = sum(document.held_out for document in documents) / len(documents)
    assert 0.02 < share < 0.10
    assert not [name for name in names if "test" in name.split("/")[:-1] or name.startswith(("site-", "dist-"))]


def test_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    import sentencepiece

    corpus = load("corpus")
    texts = [document.text for document in corpus.documents()][:60]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus.VOCAB_SIZE = 700
    corpus.train_tokenizer(tmp_path / "train.jsonl", tmp_path / "bpe.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    odd = ["", " ", "\n", "a\n\n  b\t", "    x = 'é€😀'\r\n", "</s> <s> <unk>", "\x00\x7f", "trailing  "]
    for text in [*texts, *odd]:
        assert processor.decode(processor.encode(text)) == text


def write_run(folder: Path, lm: list[float], valid: dict[str, float]) -> None:
    folder.mkdir()
    lines = [
        {"step": n + 1, "tokens": 100 * (n + 1), "lm_loss": loss, "kd_loss": 1.0, "seconds": 0.5}
        for n, loss in enumerate(lm)
    ]
    lines += [{"step": len(lm), "valid": valid}]  # type: ignore[dict-item]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_report(tmp_path: Path) -> None:
    report = load("report")
    write_run(tmp_path / "teacher", [5.0, 3.0], {"lm_loss": 3.0, "bits_per_byte": 1.25})
    write_run(tmp_path / "plain", [6.0, 4.0, 3.9], {"lm_loss": 9.0})
    write_run(tmp_path / "distilled", [6.0, 4.5, 3.5], {"lm_loss": 9.0})
    write_run(tmp_path / "plain-held-out", [3.9], {"lm_loss": 4.0, "agreement": 0.5})
    write_run(tmp_path / "distilled-held-out", [3.5], {"lm_loss": 3.5, "agreement": 0.625})
    text = report.write(tmp_path, seed=7)
    assert "| held-out LM loss, nats a token | 3.0000 | 4.0000 | 3.5000 |" in text
    assert "| top-1 agreement with the teacher |  | 50.0% | 62.5% |" in text
    assert "| training tokens | 200 | 300 | 300 |" in text and "| training tokens/s | 200 | 200 | 200 |" in text
    assert "-0.5000 nats" in text and "-50%" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "figures.json").read_text())["seed"] == 7


def test_largest_difference(tmp_path: Path) -> None:
    report = load("report")
    write_run(tmp_path / "a", [6.0, 4.0, 3.0], {})
    write_run(tmp_path / "b", [6.0, 4.25], {})
    assert report.largest_difference(tmp_path / "a", tmp_path / "b") == pytest.approx(0.25)
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step in common"):
        report.largest_difference(tmp_path / "a", tmp_path / "b")

"""The MiniPLM example's own parts: planted noise, which samples it is in, the figures. `make miniplm` runs it whole."""

from __future__ import annotations

import importlib
import json
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megakd.config.tree import parse
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.scores.artefact import write_scores
from megakd.data.selection import SelectionWriter
from megakd.pipeline.preprocess import main as preprocess
from megakd.train.config import TrainConfig

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Imports a module of the example as the example itself does."""
    for folder in ("demo", "miniplm"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    return importlib.import_module


@pytest.fixture
def noise(load: object) -> ModuleType:
    return load("noise")  # type: ignore[operator, no-any-return]


@pytest.fixture
def planted(load: object) -> ModuleType:
    return load("planted")  # type: ignore[operator, no-any-return]


@pytest.fixture
def figures(load: object) -> ModuleType:
    return load("figures")  # type: ignore[operator, no-any-return]


def make_files(number: int) -> list[tuple[str, str]]:
    rng = random.Random(5)
    lines = ["".join(rng.choice("abcdef \t") for _ in range(60)) + "\n" for _ in range(50)]
    return [(f"file-{n}", "".join(rng.choices(lines, k=rng.randint(1, 300)))) for n in range(number)]


def test_planting_is_a_function_of_file_and_seed(noise: ModuleType) -> None:
    files = make_files(40)
    documents = list(noise.plant(files, 7))
    assert documents == list(noise.plant(files, 7)) != list(noise.plant(files, 8))
    assert {document.kind for document in documents} == set(noise.KINDS)
    assert {document.part for document in documents} == set(noise.PARTS)
    alone = list(noise.plant(files[3:4], 7))
    assert alone == [document for document in documents if document.source == "file-3"]
    for source, text in files:
        own = [document for document in documents if document.source == source]
        assert len({document.part for document in own}) == 1  # a file is on one side
        # In order, what is from the file is the file, but for the order of the words in the shuffled documents.
        kept = [document for document in own if document.kind in (noise.CLEAN, noise.SHUFFLED)]
        at = 0
        for document in kept:
            piece = text[at : at + len(document.text)]
            at += len(piece)
            assert Counter(document.text.split()) == Counter(piece.split())
            assert re.findall(r"\s+", document.text) == re.findall(r"\s+", piece)
            assert document.kind == noise.SHUFFLED or document.text == piece
        assert at == len(text)


def test_each_noise_is_what_it_says(noise: ModuleType) -> None:
    rng = random.Random(3)
    text = "\n".join(f"    word{n} other{n}" for n in range(200))
    assert noise.shuffle_words(text, rng) != text
    for _ in range(20):
        block = noise.boilerplate(rng)
        assert any(block == notice * (len(block) // len(notice)) for notice in noise.NOTICES)
        assert noise.BOILERPLATE_CHARS[0] <= len(block)
    values = Counter(c for _ in range(200) for c in noise.random_bytes(rng))
    assert set(map(ord, values)) == set(range(256))
    assert max(values.values()) < 2 * min(values.values())


def test_domains_name_every_document(noise: ModuleType) -> None:
    kinds = [noise.CLEAN, noise.CLEAN, noise.RANDOM, noise.CLEAN, noise.BOILERPLATE]
    assert list(noise.domain_lines(kinds)) == ["clean 0 2", "random-bytes 2 3", "clean 3 4", "boilerplate 4 5"]
    assert list(noise.domain_lines([])) == []


@pytest.mark.parametrize("seq_length", [1, 7, 13])
def test_sample_tokens_against_a_walk_over_positions(planted: ModuleType, seq_length: int) -> None:
    rng = np.random.default_rng(seq_length)
    lengths = rng.integers(0, 30, 40)
    kinds = rng.integers(0, 4, 40).astype(np.uint8)
    ends = list(accumulate(lengths.tolist()))
    num_samples = (ends[-1] - 1) // seq_length
    expected = np.zeros((num_samples, 4), np.int64)
    for sample in range(num_samples):
        for position in range(sample * seq_length + 1, sample * seq_length + seq_length + 1):
            expected[sample, kinds[bisect_right(ends, position)]] += 1
    np.testing.assert_array_equal(planted.sample_tokens(kinds, lengths, seq_length), expected)


def test_a_sample_is_noise_if_more_than_half_of_it_is(planted: ModuleType) -> None:
    tokens = np.array([[4, 0, 0, 0], [2, 2, 0, 0], [1, 0, 0, 3], [1, 1, 2, 0], [0, 1, 1, 2], [2, 1, 1, 0]])
    assert planted.sample_kinds(tokens).tolist() == [0, 0, 3, 2, 3, 0]


def test_planted_corpus_is_found_in_its_dataset(noise: ModuleType, planted: ModuleType, tmp_path: Path) -> None:
    clean = tmp_path / "clean.jsonl"
    clean.write_text("".join(json.dumps({"source": name, "text": text}) + "\n" for name, text in make_files(12)))
    noise.write_corpus(clean, tmp_path, 1)
    kinds_file = tmp_path / "candidates.kinds.json"
    flags = ["--tokenizer-type", "ByteTokenizer", "--append-eod", "--workers", "1"]
    preprocess.main(["--input", str(tmp_path / "candidates.jsonl"), "--output-prefix", str(tmp_path / "c"), *flags])
    prefix = tmp_path / "c_text_document"
    tokens = planted.read_planted(prefix, kinds_file, 64)
    dataset = IndexedDataset(prefix)
    assert len(tokens) == (dataset.num_tokens - 1) // 64 and (tokens.sum(axis=1) == 64).all()
    # Every token but the first and those behind the last whole sample is counted, under its document's kind.
    records = [json.loads(line) for line in (tmp_path / "candidates.jsonl").read_text().splitlines()]
    kinds = json.loads(kinds_file.read_text())
    sizes = dict.fromkeys(noise.KINDS, 0)
    for record, kind in zip(records, kinds, strict=True):
        sizes[kind] += len(record["text"].encode()) + 1
    left_over = dataset.num_tokens - 1 - 64 * len(tokens)
    counted = dict(zip(noise.KINDS, tokens.sum(axis=0).tolist()))
    assert sum(sizes.values()) == dataset.num_tokens
    assert all(0 <= sizes[kind] - counted[kind] <= 1 + left_over for kind in noise.KINDS)

    kinds_file.write_text(json.dumps(kinds[:-1]))
    with pytest.raises(ValueError, match="documents"):
        planted.read_planted(prefix, kinds_file, 64)


def write_run(folder: Path, loss: float) -> None:
    folder.mkdir()
    lines = [{"step": 1, "tokens": 640}, {"step": 2, "tokens": 1280}]
    lines += [{"step": 2, "valid": {"lm_loss": loss}}]  # type: ignore[dict-item]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_selection(folder: Path, ids: list[int], num_samples: int) -> None:
    with SelectionWriter(folder) as writer:
        writer.append(np.array(ids))
        writer.finish(packing="concat", seq_length=10, num_samples=num_samples, dataset="d", rule={})


def test_figures(figures: ModuleType, tmp_path: Path) -> None:
    tokens = np.array([[10, 0, 0, 0], [10, 0, 0, 0], [6, 4, 0, 0], [0, 10, 0, 0], [0, 0, 10, 0], [2, 0, 8, 0]])
    nll = {"teacher": [1, 2, 3, 4, 0, 1], "reference": [3, 3, 5, 4, 0, 2], "reference-small": [3, 4, 5, 6, 0, 2]}
    for name, values in nll.items():
        write_scores(
            tmp_path / f"scores-{name}",
            -10 * np.array(values, np.float32),
            np.full(6, 10, np.int32),
            parameters={"packing": "concat", "seq_length": 10},
            parents={"dataset": "d", "model": name},
            tokenizer=None,
        )
        write_run(tmp_path / name, 3.0)
    kept = {"refined": [0, 1, 2], "refined-small": [0, 1, 3], "random": [0, 3, 4], "noise-free": [0, 1, 2]}
    for name, ids in kept.items():
        write_selection(tmp_path / name, ids, 6)
    for name, loss in (("refined", 4.0), ("random", 4.25), ("noise-free", 3.75)):
        write_run(tmp_path / f"student-{name}", loss)

    text = figures.write(tmp_path, tokens, seed=7)
    record = json.loads((tmp_path / "figures.json").read_text())
    clean, shuffled, boilerplate, random_kind, noise = record["kinds"].values()
    assert [row["samples"] for row in record["kinds"].values()] == [3, 1, 2, 0, 3]
    assert clean["dropped"] == 0 and shuffled["dropped"] == 1 and boilerplate["dropped"] == 1 and noise["dropped"] == 1
    assert shuffled["dropped_small"] == 0 and shuffled["dropped_random"] == 0 and boilerplate["dropped_random"] == 0.5
    assert clean["kept_share"] == 1 and noise["kept_share"] == 0 and random_kind["dropped"] is None
    assert shuffled["tokens"] == pytest.approx(14 / 60) and shuffled["kept_tokens"] == pytest.approx(4 / 30)
    assert (clean["nll_teacher"], clean["nll_reference"]) == pytest.approx((2.0, 11 / 3))
    assert record["agreement"] == pytest.approx(4 / 6) and record["negative_scores"] == 0
    assert record["correlation"]["reference"] == pytest.approx(
        np.corrcoef(np.subtract(nll["reference"], nll["teacher"]), nll["reference"])[0, 1]
    )
    assert "| boilerplate | 30.0% | 33.3% | 0.0% | 100.0% | 100.0% | 0.50 | 1.00 | 0.50 |" in text
    assert "| refined half | 4.0000 |  | 1,280 |" in text
    assert "Refined less random: -0.2500 nats a token." in text
    assert (tmp_path / "miniplm.png").read_bytes().startswith(b"\x89PNG")


def test_configurations() -> None:
    def read(*names: str, flags: Sequence[str] = ()) -> TrainConfig:
        files = [f"--config={EXAMPLES / 'miniplm' / name}.yaml" for name in names]
        return parse(TrainConfig, [*files, *flags], prog="megakd train", description="")

    data = ["--data-path", "text"]
    teacher, reference = read("teacher", flags=data), read("reference", flags=data)
    small, student = read("reference", "reference-small", flags=data), read("student", flags=data)
    sizes = [each.student.hidden_size for each in (teacher, student, reference, small)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert small.optim == reference.optim and student.training == teacher.training
    paper, paper_reference = read("paper/student"), read("paper/student", "paper/reference")
    assert paper.data.selection == ["selections/half"] and not paper_reference.data.selection
    assert paper.optim == paper_reference.optim and paper.training.global_batch_size == 512
    assert paper_reference.training.train_iters == 5e9 // (512 * 1024) + 1  # 5B tokens
    assert (paper.student.preset, paper_reference.student.preset) == ("miniplm-200m", "miniplm-104m")

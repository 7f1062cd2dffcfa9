"""``retokenize``: every text of the old dataset is in the new one, with its ends of documents; what is lost is told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizer_models import text_lines, train_byte_bpe, train_sentencepiece

from megakd.__main__ import run
from megakd.artefacts.manifest import verify_files
from megakd.data.indexed.dataset import IndexedDataset, IndexedWriter
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import ExitStatus
from megakd.pipeline.retokenize import main as retokenize
from megakd.pipeline.retokenize import run as retokenize_run
from megakd.pipeline.retokenize.shards import document_ranges

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "sp": ("SentencePieceTokenizer", str(train_sentencepiece(folder / "sp.model"))),
        "nfkc": ("SentencePieceTokenizer", str(train_sentencepiece(folder / "nfkc.model", normalization="nmt_nfkc"))),
        "bpe": ("HuggingFaceTokenizer", str(train_byte_bpe(folder / "bpe"))),
        "bytes": ("ByteTokenizer", None),
    }


def texts_of(count=60):
    lines = text_lines()
    texts = ["\n".join(lines[5 * i : 5 * i + 5]) for i in range(count)]
    return [
        *texts,
        "",
        "x",
        "  two spaces",
        "\u4e2d\u6587 \U0001f469\u200d\U0001f469 caf\u00e9 e\u0301",
        "\ufffd is a character",
        "",
    ]


def write(prefix, documents, tokenizer, sizes=None):
    """documents: lists of ids. sizes: bytes of their texts."""
    with IndexedWriter(prefix, np.int32) as writer:
        lengths = np.array([len(ids) for ids in documents], dtype=np.int32)
        writer.add_documents(np.array([i for ids in documents for i in ids], dtype=np.int64), lengths, sizes)
        writer.finish(tokenizer=tokenizer.describe())
    return IndexedDataset(prefix)


def retokenized(tmp_path, model, *flags, name="new"):
    kind, path = model
    arguments = ["--input-prefix", tmp_path / "old", "--output-prefix", tmp_path / name, "--tokenizer-type", kind]
    arguments += ["--tokenizer-model", path] if path else []
    return run(retokenize.main, [str(argument) for argument in [*arguments, "--workers", "1", *flags]])


def slow_texts(dataset, tokenizer):
    """Each document as the texts between its ends of documents."""
    documents = []
    for number in range(dataset.num_documents):
        parts: list[list[int]] = [[]]
        for token in dataset.document(number).tolist():
            if token == tokenizer.eod:
                parts.append([])
            else:
                parts[-1].append(token)
        documents.append([tokenizer.decode(part) for part in parts])
    return documents


@pytest.mark.parametrize(("old", "new"), [("sp", "bpe"), ("bpe", "sp"), ("bpe", "bytes"), ("bytes", "bpe")])
def test_no_text_is_lost(tmp_path, models, old, new):
    source, target = build_tokenizer(*models[old]), build_tokenizer(*models[new])
    texts = texts_of()
    documents = [[*source.encode(text), source.eod] for text in texts]
    documents[3] += [*source.encode("the next"), source.eod, *source.encode("and a third's head")]  # a sample
    documents[5] = documents[5][:-1]  # cut before its end
    documents[7] = [source.eod, source.eod]
    documents[9] = []
    dataset = write(tmp_path / "old", documents, source)
    assert retokenized(tmp_path, models[new], "--strict", "--shard-tokens", "3000") == ExitStatus.COMPLETE
    result = IndexedDataset(tmp_path / "new")
    assert not verify_files(result.manifest.path)
    assert dict(result.manifest.parents) == {"dataset": dataset.fingerprint}
    assert result.manifest.tokenizer["hash"] == target.hash
    before, after = slow_texts(dataset, source), slow_texts(result, target)
    before = [texts if texts[-1] == "" and len(texts) > 1 else [*texts, ""] for texts in before]  # an end is added
    assert after == before
    met = result.manifest.parameters["counts"]
    total = sum(len(text.encode()) for texts in before for text in texts)
    assert met["source_bytes"] == met["target_bytes"] == total
    assert met["documents"] == len(documents) and met["source_tokens"] == dataset.num_tokens
    assert met["empty_documents"] == sum(not any(texts) for texts in before) and met["bad_documents"] == 0
    assert all(ids[-1] == target.eod for ids in (result.document(i) for i in range(result.num_documents)))
    # the ids are those of the text, whichever engine made them
    first = result.document(0).tolist()
    assert first[:-1] == target.encode(texts[0])
    assert [path.name for path in tmp_path.iterdir() if "work" in path.name or "quarantine" in path.name] == []


@pytest.mark.slow
def test_bytes_are_those_of_the_original_text(tmp_path, models):
    """The old tokenizer lost some of it, the new one loses more: what is counted stays what was read first."""
    source = build_tokenizer(*models["nfkc"])
    texts = ["\ufb01ne  \u2460\u2460 \u00bd", "", *texts_of(30), "\u200b\u200b", "caf\u00e9"]
    sizes = [len(text.encode()) for text in texts]
    documents = [[*source.encode(text), source.eod] for text in texts]
    documents[4] += documents[3]  # a sample of several texts
    write(tmp_path / "old", documents, source, np.array(sizes))
    for name, flags in (("a", ()), ("b", ("--workers", "2", "--shard-tokens", "97"))):
        assert retokenized(tmp_path, models["bpe"], "--max-bad-fraction", "1", *flags, name=name) == ExitStatus.COMPLETE
        assert IndexedDataset(tmp_path / name).text_bytes.tolist() == sizes
    write(tmp_path / "old", documents, source)
    assert retokenized(tmp_path, models["bpe"], "--max-bad-fraction", "1", name="c") == ExitStatus.COMPLETE
    assert IndexedDataset(tmp_path / "c").text_bytes is None


def test_without_an_end_of_document(tmp_path, models):
    source, target = build_tokenizer("ByteTokenizer", None), build_tokenizer(*models["bpe"])
    write(tmp_path / "old", [source.encode("cut"), [*source.encode("whole"), 256], []], source)
    assert retokenized(tmp_path, models["bpe"], "--append-eod", "false") == ExitStatus.COMPLETE
    result = IndexedDataset(tmp_path / "new")
    expected = [target.encode("cut"), [*target.encode("whole"), target.eod], []]
    assert [result.document(i).tolist() for i in range(3)] == expected


def test_the_number_of_workers_and_the_shards_do_not_show(tmp_path, models):
    source = build_tokenizer(*models["bpe"])
    dataset = write(tmp_path / "old", [[*source.encode(text), source.eod] for text in texts_of()], source)
    for name, flags in (("a", ("--workers", "2", "--shard-tokens", "997")), ("b", ("--tokenizer-engine", "reference"))):
        assert retokenized(tmp_path, models["sp"], *flags, name=name) == ExitStatus.COMPLETE
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    for shard_tokens in (1, 50, 997, 10**9):
        ranges = document_ranges(dataset, shard_tokens)
        assert [i for first, stop in ranges for i in range(first, stop)] == list(range(dataset.num_documents))
        assert all(stop > first for first, stop in ranges)
        for first, stop in ranges:
            starts = {dataset.document_start(i) // shard_tokens for i in range(first, stop) if len(dataset.document(i))}
            assert len(starts) <= 1


@pytest.mark.slow
def test_a_normalising_tokenizer_is_refused_beyond_the_budget_and_told(tmp_path, models, capsys):
    source = build_tokenizer(*models["bpe"])
    texts = ["plain", "\u2460 \uff21 full width", "plain again", "e\u0301 joins"]
    write(tmp_path / "old", [[*source.encode(text), source.eod] for text in texts], source)
    assert retokenized(tmp_path, models["nfkc"], "--max-bad-fraction", "0.4") == ExitStatus.DATA_BUDGET
    error = capsys.readouterr().err
    assert "2 of 4 documents" in error and "2 are normalised" in error and "document 1" in error
    assert not (tmp_path / "new.bin").exists()
    listed = [json.loads(line) for line in (tmp_path / "new.quarantine.jsonl").read_text().splitlines()]
    assert [(record["document"], record["reason"]) for record in listed] == [(1, "normalised"), (3, "normalised")]
    assert "'\u2460" in listed[0]["detail"]
    assert retokenized(tmp_path, models["nfkc"], "--strict") == ExitStatus.DATA_BUDGET
    # a larger budget finishes from what is done
    assert retokenized(tmp_path, models["nfkc"], "--max-bad-fraction", "0.5") == ExitStatus.COMPLETE
    assert "continuing the unfinished run" in capsys.readouterr().err
    met = IndexedDataset(tmp_path / "new").manifest.parameters["counts"]
    assert (met["bad_documents"], met["normalised"], met["undecodable"]) == (2, 2, 0)
    assert met["source_bytes"] != met["target_bytes"]


def test_it_stops_once_too_many_are_bad_of_all_there_are(tmp_path, models, capsys, monkeypatch):
    monkeypatch.setattr(retokenize_run, "WORTH_STOPPING_BYTES", 0)
    source = build_tokenizer(*models["bpe"])
    texts = ["\u2460 \uff21 full width"] * 60 + ["plain"] * 40
    write(tmp_path / "old", [[*source.encode(text), source.eod] for text in texts], source)
    flags = ("--workers", "1", "--shard-tokens", "100")
    assert retokenized(tmp_path, models["nfkc"], *flags, "--max-bad-fraction", "0.2") == ExitStatus.DATA_BUDGET
    error = capsys.readouterr().err
    assert "did not survive so far" in error and "of the 100 that there are" in error and "--source-tok" in error
    assert 0 < len((tmp_path / "new.quarantine.jsonl").read_text().splitlines()) < 60
    assert retokenized(tmp_path, models["nfkc"], *flags, "--max-bad-fraction", "0.6") == ExitStatus.COMPLETE
    assert "continuing the unfinished run" in capsys.readouterr().err
    assert len((tmp_path / "new.quarantine.jsonl").read_text().splitlines()) == 60


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("old", ["bpe", "bytes", "sp"])
def test_half_a_character_is_told(tmp_path, models, old, cut, capsys):
    """A sample may start or end inside a character; a replacement character that is text is none of these."""
    source = build_tokenizer(*models[old])
    ids = source.encode("caf\U0001f469")  # four bytes, each a token
    texts = [source.encode("whole"), ids[:-cut], source.encode("a \ufffd b"), ids]
    write(tmp_path / "old", texts, source)
    assert "\ufffd" in source.decode(ids[:-cut]) and retokenized(tmp_path, models["bytes"]) == ExitStatus.DATA_BUDGET
    assert "1 of 4 documents" in capsys.readouterr().err
    (listed,) = (tmp_path / "new.quarantine.jsonl").read_text().splitlines()
    assert json.loads(listed) == {"document": 1, "reason": "undecodable", "detail": ""}


def test_refusals(tmp_path, models, capsys):
    source = build_tokenizer(*models["sp"])
    write(tmp_path / "old", [source.encode("text")], source)

    def refused(status, message, *flags, model="bytes"):
        assert retokenized(tmp_path, models[model], *flags) == status
        assert message in capsys.readouterr().err

    refused(ExitStatus.USAGE, "the output is the input", "--output-prefix", str(tmp_path / "old"))
    refused(ExitStatus.USAGE, "folder does not exist", "--output-prefix", str(tmp_path / "none" / "new"))
    refused(ExitStatus.USAGE, "expected FOLDER/NAME", "--output-prefix", f"{tmp_path}/")
    refused(ExitStatus.USAGE, "--max-bad-fraction 2", "--max-bad-fraction", "2")
    refused(ExitStatus.USAGE, "--workers -1", "--workers", "-1")
    for place in (tmp_path / "old.bin", tmp_path / "old.bin" / "below"):
        refused(ExitStatus.USAGE, f"--work-dir {place}: a file is in its place", "--work-dir", str(place))
    refused(ExitStatus.USAGE, "no such file", "--source-tokenizer-model", str(tmp_path / "gone.model"))
    told = f"opening its tokenizer: --source-tokenizer-model {models['bpe'][1]}"
    refused(ExitStatus.USAGE, told, "--source-tokenizer-model", models["bpe"][1])
    refused(ExitStatus.MISMATCH, source.hash, "--source-tokenizer-model", models["nfkc"][1])
    refused(ExitStatus.USAGE, "--tokenizer-type is NullTokenizer", "--tokenizer-type", "NullTokenizer")
    (tmp_path / "old.manifest.json").unlink()
    refused(ExitStatus.USAGE, "say which it was with --source-tokenizer-type")
    refused(ExitStatus.CORRUPT, "its tokenizer has 257", "--source-tokenizer-type", "ByteTokenizer")
    kind, model = models["sp"]
    known = ("--source-tokenizer-type", kind, "--source-tokenizer-model", model)
    assert retokenized(tmp_path, models["bytes"], *known) == ExitStatus.COMPLETE


def start(tmp_path, name):
    command = [sys.executable, "-m", "megakd", "retokenize", "--input-prefix", str(tmp_path / "old")]
    command += ["--output-prefix", str(tmp_path / name / "o"), "--tokenizer-type", "ByteTokenizer", "--workers", "1"]
    (tmp_path / name).mkdir(exist_ok=True)
    return subprocess.Popen([*command, "--shard-tokens", "2000"], stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.slow
def test_kills_and_signals(tmp_path):
    source = build_tokenizer("ByteTokenizer", None)
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 5000, 1000)
    write(tmp_path / "old", [rng.integers(32, 127, 400).tolist() for _ in range(1000)], source, sizes)
    assert start(tmp_path, "whole").wait(200) == ExitStatus.COMPLETE  # 200 shards
    killed = tmp_path / "killed"
    for shards, number in ((3, signal.SIGKILL), (40, signal.SIGKILL), (70, signal.SIGTERM), (100, signal.SIGKILL)):
        process = start(tmp_path, "killed")
        deadline = time.monotonic() + 200
        while len(list(killed.glob("o.work/*/*.json"))) < shards and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate(timeout=200)
        assert process.returncode == (ExitStatus.STOPPED if number == signal.SIGTERM else -number)
        assert len(list(killed.glob("o.work/*/*.json"))) >= shards and not list(killed.glob("o.[bim]*"))
    process = start(tmp_path, "killed")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == ExitStatus.COMPLETE and "continuing the unfinished run" in errors
    assert IndexedDataset(killed / "o").text_bytes.tolist() == sizes.tolist()
    for suffix in ("bin", "bytes", "idx", "manifest.json"):
        assert (tmp_path / f"whole/o.{suffix}").read_bytes() == (killed / f"o.{suffix}").read_bytes()
    assert sorted(path.name for path in killed.iterdir()) == ["o.bin", "o.bytes", "o.idx", "o.manifest.json"]

"""preprocess: the files are Megatron's, and a function of the corpus alone."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tokenizer_models import train_byte_bpe, train_sentencepiece

from megakd.artefacts.manifest import read_manifest
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.idx_format import best_dtype
from megakd.data.indexed.writer import write_dataset_manifest
from megakd.data.tokenizer import build_tokenizer
from megakd.data.tokenizers.recorded import open_tokenizer
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.pipeline.preprocess import run as corpus_module
from megakd.pipeline.preprocess.main import main

TEXTS = [f"document {i} " + "wörter " * (i * 7 % 23) for i in range(200)] + ["", " \n", "x" * 9000, "中文\x00 </s>"]


def write_lines(path: Path, texts: list[str] = TEXTS, **extra: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **extra}, ensure_ascii=False) + "\n" for text in texts))
    return path


def preprocess(*inputs: Path | str, out: Path, flags: tuple[str, ...] = ()) -> int:
    common = ["--input", *map(str, inputs), "--output-prefix", str(out)]
    kind = () if "--tokenizer-type" in flags else ("--tokenizer-type", "ByteTokenizer")
    return main([*common, *kind, *flags])


def outputs(prefix: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(prefix.name + "[_.]*")
    }


@pytest.mark.slow
@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_files_are_those_of_megatrons_builder(kind: Any, append_eod: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    model = train_byte_bpe(tmp_path / "bpe") if kind.startswith("H") else train_sentencepiece(tmp_path / "sp.model")
    flags = ("--tokenizer-type", kind, "--tokenizer-model", str(model), "--shard-bytes", "5000")
    out = tmp_path / "ours"
    assert preprocess(write_lines(tmp_path / "a.jsonl"), out=out, flags=flags + ("--append-eod",) * append_eod) == 0

    tokenizer = build_tokenizer(kind, model)
    builder = indexed_dataset.IndexedDatasetBuilder(
        str(tmp_path / "megatron.bin"), dtype=best_dtype(tokenizer.vocab_size).type
    )
    documents = [tokenizer.encode(text) + [tokenizer.eod] * append_eod for text in TEXTS]
    for ids in documents:
        builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "megatron.idx"))
    for suffix in (".bin", ".idx"):
        ours = Path(f"{out}_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"megatron{suffix}").read_bytes(), suffix
    theirs = indexed_dataset.IndexedDataset(f"{out}_text_document")
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert len(IndexedDataset(f"{out}_text_document").lengths) == len(TEXTS)


@pytest.mark.slow
def test_bytes_do_not_depend_on_workers_or_shards(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl")
    second = write_lines(tmp_path / "b.jsonl", TEXTS[50:])
    second.write_bytes(second.read_bytes() + b"broken\n\n{}\n" + second.read_bytes()[:-1])
    results = []
    for workers, shard_bytes in ((1, 0), (2, 3000), (3, 3000), (2, 100)):
        out = tmp_path / f"{workers}-{shard_bytes}"
        flags = ("--append-eod", "--workers", str(workers), "--shard-bytes", str(shard_bytes))
        assert preprocess(first, second, out=out, flags=(*flags, "--max-bad-fraction", "0.1")) == 0
        results.append(
            {k: v.replace(out.name.encode(), b"OUT") for k, v in outputs(out).items() if "manifest" not in k}
        )
        manifest = read_manifest(f"{out}_text_document.manifest.json")
        results[-1]["fingerprint"] = manifest.fingerprint.encode()
    names = ["_text_document.bin", "_text_document.bytes", "_text_document.idx"]
    assert sorted(results[0]) == [".quarantine.jsonl", *names, "fingerprint"]
    assert all(result == results[0] for result in results[1:])
    bad = [json.loads(line) for line in results[0][".quarantine.jsonl"].splitlines()]
    count = len(TEXTS) - 50
    assert [(record["line"], record["reason"]) for record in bad] == [
        (count + 1, "malformed JSON"),
        (count + 3, "missing key"),
    ]
    for record in bad:
        assert second.read_bytes()[record["byte_offset"] :].startswith((b"broken\n", b"{}\n"))
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob("*.lock"))


def test_compressed_and_plain_files_give_the_same_tokens(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "a.jsonl")
    data = plain.read_bytes()
    middle = data.index(b"\n", 4000) + 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data[:middle]) + gzip.compress(data[middle:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(data[:middle]) + compress(data[middle:]))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert preprocess(tmp_path / name, out=tmp_path / name[0], flags=("--shard-bytes", "2000")) == 0
    for suffix in ("bin", "idx", "bytes"):
        want = (tmp_path / f"a_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"b_text_document.{suffix}").read_bytes() == want
        assert (tmp_path / f"c_text_document.{suffix}").read_bytes() == want
    assert preprocess(tmp_path / "?.jsonl*", out=tmp_path / "all") == 0
    three = IndexedDataset(tmp_path / "all_text_document")
    assert three.num_documents == 3 * len(TEXTS)


def test_one_dataset_for_each_key(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}", "other": f"o{i} o"}) for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"text": "without other"})]))
    flags = ("--json-keys", "text", "other", "--max-bad-fraction", "0.05")
    assert preprocess(tmp_path / "a.jsonl", out=tmp_path / "o", flags=flags) == 0
    for key, want in (("text", "t7"), ("other", "o7 o")):
        dataset = IndexedDataset(tmp_path / f"o_{key}_document")
        assert dataset.num_documents == 50  # a record that lacks one key gives no document to the other either
        assert bytes(np.asarray(dataset[7], dtype=np.uint8)) == want.encode()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "append_eod"), [("reference", False), ("auto", True)])
def test_bytes_are_those_of_the_texts_and_not_of_the_tokens(engine: str, append_eod: bool, tmp_path: Path) -> None:
    """With a normalising tokenizer, whichever engine encodes, over shards."""
    model = train_sentencepiece(tmp_path / "sp.model", normalization="nmt_nfkc")
    texts = [*TEXTS[:50], "\ufb01ne  \u2460\u2460 \u00bd\u200b\u200b", "\u200b", "caf\u00e9 \U0001f469", "</s>", ""]
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model), "--shard-bytes", "500")
    flags += ("--tokenizer-engine", engine, *["--append-eod"] * append_eod)
    assert preprocess(write_lines(tmp_path / "a.jsonl", texts), out=tmp_path / "o", flags=flags) == 0
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert dataset.text_bytes is not None and dataset.text_bytes.tolist() == [len(text.encode()) for text in texts]


def test_bytes_of_each_key_without_the_records_that_have_no_ids(tmp_path: Path) -> None:
    records = [{"a": " 1  2", "b": "3"}, {"a": "none", "b": "4"}, {"a": "5", "b": "6   7 "}, {"a": "8", "b": "\u00b2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--json-keys", "a", "b")
    assert preprocess(tmp_path / "a.jsonl", out=tmp_path / "o", flags=(*flags, "--max-bad-fraction", "0.5")) == 0
    for key, ids, sizes in (("a", [[1, 2], [5]], [5, 1]), ("b", [[3], [6, 7]], [1, 6])):
        dataset = IndexedDataset(tmp_path / f"o_{key}_document")
        assert [document.tolist() for document in dataset] == ids
        assert dataset.text_bytes is not None and dataset.text_bytes.tolist() == sizes


def test_a_dataset_of_an_older_version_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, prefix = write_lines(tmp_path / "a.jsonl"), tmp_path / "o_text_document"
    assert preprocess(corpus, out=tmp_path / "o") == 0
    manifest = read_manifest(f"{prefix}.manifest.json")
    told = manifest.parameters["dataset"]
    (tmp_path / "o_text_document.bytes").unlink()
    older = write_dataset_manifest(
        prefix,
        manifest.files[:2],
        dtype=np.dtype(told["dtype"]),
        num_documents=told["num_documents"],
        num_sequences=told["num_sequences"],
        max_token_id=told["max_token_id"],
        parameters=manifest.parameters,
        parents=manifest.parents,
        tokenizer=manifest.tokenizer,
    )
    capsys.readouterr()
    assert preprocess(corpus, out=tmp_path / "o") == 0
    assert IndexedDataset(prefix, expect_fingerprint=older.fingerprint).text_bytes is None
    assert f"{prefix}: an older version made it, without the bytes of its text" in capsys.readouterr().err


def test_manifest_tells_where_the_tokens_come_from(tmp_path: Path) -> None:
    model = train_byte_bpe(tmp_path / "bpe")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model), "--append-eod")
    preprocess(write_lines(tmp_path / "a.jsonl"), out=tmp_path / "o", flags=flags)
    manifest = read_manifest(tmp_path / "o_text_document.manifest.json")
    assert manifest.tokenizer == build_tokenizer("HuggingFaceTokenizer", model).describe()
    assert list(manifest.parents) == ["a.jsonl"]
    assert manifest.parameters["append_eod"] is True
    assert manifest.parameters["tokenizer_engine"]["engine"] in ("gigatoken", "reference")
    assert manifest.parameters["tokenizer_engine"]["reason"]
    assert manifest.parameters["counts"]["documents"] == len(TEXTS)


def test_the_end_of_a_document_is_said_counted_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = train_byte_bpe(tmp_path / "bpe")
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    flags = (
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(model),
        "--tokenizer-engine",
        "reference",
    )
    text = write_lines(tmp_path / "a.jsonl", ["one", "two<|endoftext|>three", "<|endoftext|>", "<|im_end|>"])
    assert preprocess(text, out=tmp_path / "o", flags=(*flags, "--append-eod")) == 0
    said = capsys.readouterr().err
    assert "end of document: <|im_end|>, id 1 (eos_token of tokenizer_config.json)\n" in said
    assert "--eod-token '<|endoftext|>' takes it" in said and "1 documents have <|im_end|> written out" in said
    assert preprocess(text, out=tmp_path / "p", flags=(*flags, "--append-eod", "--eod-token", "<|endoftext|>")) == 0
    said = capsys.readouterr().err
    assert "end of document: <|endoftext|>, id 0 (--eod-token)\n" in said and "2 documents have <|endoftext|>" in said
    dataset = IndexedDataset(tmp_path / "p_text_document")
    assert dataset.document(0)[-1] == 0 and dataset.manifest is not None
    assert dataset.manifest.parameters["documents_with_eod_token"] == 2
    assert dataset.manifest.parameters["eod_token"] == "<|endoftext|>"
    assert open_tokenizer(dataset).eod == open_tokenizer(dataset, tokenizer_model=str(model)).eod == 0


def test_the_gates_choice_is_what_the_workers_use(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path / "sp.model")
    flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model))
    path = write_lines(tmp_path / "a.jsonl")
    preprocess(path, out=tmp_path / "auto", flags=flags)
    preprocess(path, out=tmp_path / "slow", flags=(*flags, "--tokenizer-engine", "reference"))
    assert outputs(tmp_path / "auto")["_text_document.bin"] == outputs(tmp_path / "slow")["_text_document.bin"]
    engine = read_manifest(tmp_path / "slow_text_document.manifest.json").parameters["tokenizer_engine"]
    assert engine == {"engine": "reference", "reason": "asked for", "routed": [], "code_points": []}


def test_the_folder_of_unfinished_work_is_no_file(tmp_path: Path) -> None:
    text = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=f"--work-dir {text}: a file is in its place"):
        preprocess(text, out=tmp_path / "out", flags=("--work-dir", str(text)))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (("nothing.jsonl",), "no such file"),
        (("*.nothing",), "no such file"),
        (("a.jsonl", "./a.jsonl"), "the same file"),
        (("*.jsonl", "a.jsonl"), "the same file"),
        (("link.jsonl", "a.jsonl"), "the same file"),
        (("folder",), "not a file"),
        (("utf16.txt",), "iconv"),
        (("utf16_without_mark.txt",), "iconv"),
        (("utf16.gz",), "iconv"),
        (("b.bz2",), "bzip2"),
        (("p.parquet",), "Parquet"),
        (("empty.txt",), "no document"),
        (("blank.txt",), "no document"),
    ],
)
def test_inputs_that_are_refused(
    inputs: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "utf16.txt").write_text('{"text": "a"}\n', encoding="utf-16")
    (tmp_path / "utf16_without_mark.txt").write_text('{"text": "a"}\n', encoding="utf-16-le")
    (tmp_path / "utf16.gz").write_bytes(gzip.compress('{"text": "a"}\n'.encode("utf-16")))
    (tmp_path / "b.bz2").write_bytes(b"BZh91AY&SY")
    (tmp_path / "p.parquet").write_bytes(b"PAR1\x15\x04")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b"\n \r\n\n")
    if inputs[0] == "*.jsonl":
        (tmp_path / "link.jsonl").unlink()
    with pytest.raises(UsageError, match=words):
        preprocess(*inputs, out=tmp_path / "o")
    assert not list(tmp_path.glob("o_*")) and not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "head only", "flipped", "trailing", "empty", "not compressed"])
def test_cut_and_damaged_compressed_files_are_errors(suffix: str, damage: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = b"".join(b'{"text": "%s"}\n' % rng.bytes(200).hex().encode() for _ in range(50))
    packed = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    flipped = bytearray(packed)
    flipped[-6] ^= 1  # in gzip's checksum, in zstandard's last block or checksum
    content = {
        "cut": packed[:-1],
        "head only": packed[:11],
        "flipped": bytes(flipped),
        "trailing": packed + b"more",
        "empty": b"",
        "not compressed": data,
    }[damage]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=str(path)):
        preprocess(path, out=tmp_path / "o")
    assert not list(tmp_path.glob("o_*"))


@pytest.mark.slow
def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "' + b" " * (100 << 20) + b'"}\n'))
    with pytest.raises(CorruptError, match="no corpus does that"):
        preprocess(path, out=tmp_path / "o")


def test_an_input_that_changes_meanwhile_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    collect = corpus_module._collect

    def grow(*arguments: Any) -> Any:
        time.sleep(0.01)
        path.write_bytes(path.read_bytes() + b'{"text": "late"}\n')
        return collect(*arguments)

    monkeypatch.setattr(corpus_module, "_collect", grow)
    with pytest.raises(MismatchError, match=r"a\.jsonl"):
        preprocess(path, out=tmp_path / "o")
    assert not list(tmp_path.glob("o_*"))


def test_flags_that_cannot_work_are_usage_errors(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    model = train_byte_bpe(tmp_path / "bpe")
    (model / "tokenizer_config.json").unlink()
    hugging_face = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model))
    for flags, words in (
        (("--workers", "-1"), "workers"),
        (("--max-bad-fraction", "1.5"), "max-bad-fraction"),
        (("--max-doc-bytes", "0"), "max-doc-bytes"),
        (("--json-keys", "a", "a"), "json-keys"),
        (("--json-keys", "a/b"), "json-keys"),
        (("--no-such-flag", "1"), "no-such-flag"),
        ((*hugging_face, "--append-eod"), "eos_token"),
    ):
        with pytest.raises(UsageError, match=words):
            preprocess(path, out=tmp_path / "o", flags=flags)

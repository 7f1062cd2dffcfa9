"""Bad records: each kind is counted, listed with its place, and held to the budget; none becomes a document."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megakd.artefacts.manifest import read_manifest
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.text.records import Lines, RecordError, count_duplicate_keys, parse_texts
from megakd.errors import DataBudgetError
from megakd.pipeline.preprocess.main import main

GOOD = b'{"text": "good"}\n'

BAD = {
    "half an object": (b'{"text": "a"\n', "malformed JSON"),
    "no JSON": (b"hello\n", "malformed JSON"),
    "single quotes": (b"{'text': 'a'}\n", "malformed JSON"),
    "trailing comma": (b'{"text": "a",}\n', "malformed JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}\n', "malformed JSON"),
    "trailing garbage": (b'{"text": "a"} x\n', "malformed JSON"),
    "NaN for a text": (b'{"text": NaN}\n', "not text"),
    "raw NUL": (b'{"text": "a\x00b"}\n', "malformed JSON"),
    "raw control character": (b'{"text": "a\tb"}\n', "malformed JSON"),
    "bad escape": (b'{"text": "\\x41"}\n', "malformed JSON"),
    "mark in the middle of a file": (b'\xef\xbb\xbf{"text": "a"}\n', "malformed JSON"),
    "nesting bomb": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "malformed JSON"),
    "nesting bomb with NaN": (b'{"text": NaN, "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "malformed JSON"),
    "NaN in small letters": (b'{"text": "a", "n": nan}\n', "malformed JSON"),
    "number with a leading zero": (b'{"text": "a", "n": 01}\n', "malformed JSON"),
    "invalid UTF-8 beside NaN": (b'{"text": "a\xff", "n": NaN}\n', "invalid UTF-8"),
    "lone surrogate beside NaN": (b'{"text": "a\\ud800b", "n": NaN}\n', "lone surrogate"),
    "invalid UTF-8": (b'{"text": "a\xff"}\n', "invalid UTF-8"),
    "cut UTF-8": (b'{"text": "a\xe4\xb8"}\n', "invalid UTF-8"),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}\n', "invalid UTF-8"),
    "lone surrogate": (b'{"text": "a\\ud800b"}\n', "lone surrogate"),
    "reversed surrogates": (b'{"text": "\\udc00\\ud800"}\n', "lone surrogate"),
    "missing key": (b'{"txt": "a"}\n', "missing key"),
    "null": (b'{"text": null}\n', "not text"),
    "number": (b'{"text": 3}\n', "not text"),
    "boolean": (b'{"text": true}\n', "not text"),
    "list": (b'{"text": ["a"]}\n', "not text"),
    "nested": (b'{"text": {"text": "a"}}\n', "not text"),
    "string at the top": (b'"text"\n', "not an object"),
    "list at the top": (b'[{"text": "a"}]\n', "not an object"),
    "null at the top": (b"null\n", "not an object"),
    "too long": (b'{"text": "' + b"a" * 300_000 + b'"}\n', "too long"),
    "too long without an end": (b"a" * 300_000 + b"\n", "too long"),
    "cut last line": (b'{"text": "the file ends he', "cut last line"),
}


def preprocess(path: Path, *flags: str, out: str = "o") -> int:
    return main(
        ["--input", str(path), "--output-prefix", str(path.parent / out), "--max-doc-bytes", "250000", *flags]
        + ([] if "--tokenizer-type" in flags else ["--tokenizer-type", "ByteTokenizer"])
    )


def quarantine(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "o.quarantine.jsonl").read_bytes().splitlines()]


def texts(folder: Path) -> list[str]:
    dataset = IndexedDataset(folder / "o_text_document")
    return [bytes(np.asarray(dataset[i], dtype=np.uint8)).decode() for i in range(dataset.num_documents)]


@pytest.mark.parametrize("kind", [kind for kind, (_, reason) in BAD.items() if reason != "too long"])
def test_each_kind_is_refused_and_says_why(kind: str) -> None:
    """The parser alone, so that so many kinds take no time; the whole command follows."""
    line, reason = BAD[kind]
    with pytest.raises(RecordError) as caught:
        parse_texts(line, ["text"])
    assert caught.value.reason == reason and caught.value.detail


@pytest.mark.parametrize("shard_bytes", ["0", "20000"])
def test_all_kinds_in_one_file(shard_bytes: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content, want = b"", []
    for i, (line, reason) in enumerate(BAD.values()):
        content += GOOD
        want.append((2 * i + 2, len(content), reason))
        content += line
    path.write_bytes(content)
    with pytest.raises(DataBudgetError, match=r"34 of 68 records are bad.*o\.quarantine\.jsonl"):
        preprocess(path, "--shard-bytes", shard_bytes)
    assert not list(tmp_path.glob("o_*"))
    found = quarantine(tmp_path)
    assert [(record["line"], record["byte_offset"], record["reason"]) for record in found] == want
    assert {record["file"] for record in found} == {str(path)}
    assert all(record["detail"] for record in found)

    # A larger budget finishes from what is done, and the good records are all there.
    assert preprocess(path, "--shard-bytes", shard_bytes, "--max-bad-fraction", "0.5") == 0
    assert texts(tmp_path) == ["good"] * len(BAD)
    assert quarantine(tmp_path) == found
    counts = read_manifest(tmp_path / "o_text_document.manifest.json").parameters["counts"]
    assert (counts["documents"], counts["bad_records"]) == (len(BAD), len(BAD))


def test_the_budget_is_a_fraction_of_the_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 999 + b"bad\n")
    assert preprocess(path) == 0  # exactly the default, one in a thousand
    with pytest.raises(DataBudgetError):
        preprocess(path, "--strict", out="strict")
    path.write_bytes(GOOD * 998 + b"bad\n")
    with pytest.raises(DataBudgetError):
        preprocess(path, out="over")
    assert sorted(file.name for file in tmp_path.glob("*_text_document.*")) == [
        "o_text_document.bin",
        "o_text_document.bytes",
        "o_text_document.idx",
        "o_text_document.manifest.json",
    ]


def test_a_clean_run_leaves_no_list_of_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + b"bad\n")
    with pytest.raises(DataBudgetError):
        preprocess(path)
    assert len(quarantine(tmp_path)) == 1
    path.write_bytes(GOOD * 3)
    assert preprocess(path, "--strict") == 0
    assert not (tmp_path / "o.quarantine.jsonl").exists()


def test_what_is_odd_but_good(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "after a mark"}\r\n',
        b"\r\n",
        b"  \n",
        b'  {"text": "white space around"}  \n',
        b'{"text": "\\u0000 \\ud83d\\ude00 \\u00e9"}\n',
        b'{"text": "first", "text": "last wins"}\n',
        b'{"text": "of \\"text\\" and \\"text\\"", "meta": {"text": 1}}\n',
        b'{"text": ""}\n',
        # What Megatron's tool takes, which reads with json.loads.
        b'{"text": "its score is none", "score": NaN, "low": -Infinity, "high": [Infinity]}\n',
        b'{"text": "too large", "id": 1e999, "n": ' + b"9" * 5000 + b', "m": 18446744073709551616}\n',
        b'{"text": "surrogates elsewhere", "title": "\\ud800", "\\udfff": 1}\n',
        b'{"text": "twice", "text": "a key twice beside NaN", "n": NaN}\n',
        b"\n",
        b'{"text": "no line end"}',
    ]
    path.write_bytes(b"".join(lines))
    assert preprocess(path, "--strict") == 0
    assert texts(tmp_path) == [
        "after a mark",
        "white space around",
        "\0 \U0001f600 é",
        "last wins",
        'of "text" and "text"',
        "",
        "its score is none",
        "too large",
        "surrogates elsewhere",
        "a key twice beside NaN",
        "no line end",
    ]
    counts = read_manifest(tmp_path / "o_text_document.manifest.json").parameters["counts"]
    assert counts == {
        "lines": 14,
        "blank_lines": 3,
        "documents": 11,
        "empty_documents": 1,
        "bad_records": 0,
        "duplicate_keys": 2,
    }


def test_duplicate_keys_are_counted_at_the_top_only() -> None:
    for line, want in (
        (b'{"text": "a"}', 0),
        (b'{"text": "a", "text": "b"}', 1),
        (b'{"text": "a", "text": "b", "text": "c"}', 1),
        (b'{"text": "a", "m": {"text": 1, "text": 2}}', 0),
        (b'{"text": "\\"text\\" \\"text\\""}', 0),
    ):
        assert count_duplicate_keys(line, ["text"], [b'"text"']) == want, line


def test_text_that_the_tokenizer_has_no_ids_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1 2 3"}\n{"text": "1 two"}\n{"text": "4"}\n{"text": "70"}\n')
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--append-eod", "--max-bad-fraction", "0.5")
    assert preprocess(path, *flags) == 0
    assert [(record["line"], record["reason"]) for record in quarantine(tmp_path)] == [
        (2, "no token ids"),
        (4, "no token ids"),
    ]
    dataset = IndexedDataset(tmp_path / "o_text_document")
    assert [dataset[i].tolist() for i in range(dataset.num_documents)] == [[1, 2, 3, 64], [4, 64]]


def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"a" * (50 << 20) + b'"}\n' + GOOD)
    tracemalloc.start()
    lines = list(Lines(path, "plain", max_line_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [line for _, line in lines] == [GOOD, None, GOOD]
    assert lines[2][0] == path.stat().st_size - len(GOOD)
    assert peak < 8 << 20


@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 18, 50, 1000])
def test_shards_of_any_size_cover_every_line_once(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b"0123456789abcde\n", b"\n", b"\n", b"x" * 100 + b"\n", b"ab\r\n", b"", b"last"]
    path.write_bytes(b"".join(lines))
    found = []
    for start in range(0, path.stat().st_size, size):
        for offset, line in Lines(path, "plain", start=start, max_line_bytes=50):
            if offset >= start + size:
                break
            found.append((offset, line))
    whole = list(Lines(path, "plain", max_line_bytes=50))
    assert found == whole
    assert [line for _, line in whole] == [b"0123456789abcde\n", b"\n", b"\n", None, b"ab\r\n", b"last"]

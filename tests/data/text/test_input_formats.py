"""Files that are no JSON lines are named by their content, with a way out, before any work; others are let through."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import sqlite3
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megakd.data.text.input_formats import kind_of
from megakd.errors import CorruptError, UsageError
from megakd.pipeline.preprocess.main import main

RECORD = b'{"text": "good", "n": 1}\n'
RECORDS = [{"text": "word " * 20, "tags": [{"a": i}, {"b": 2}]} for i in range(1000)]


def tar(*, old: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(RECORD)
        archive.addfile(entry, io.BytesIO(RECORD))
    data = bytearray(out.getvalue())
    if old:  # before POSIX: without its mark
        data[257:265] = bytes(8)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, RECORD)
    return out.getvalue()


def saved(save: Callable[[io.BytesIO], object]) -> bytes:
    save(out := io.BytesIO())
    return out.getvalue()


SKIPPABLE = b"\x5a\x2a\x4d\x18\x04\x00\x00\x00abcd"
NOT_JSON_LINES = {
    "lz4": (b'\x04"M\x18' + bytes(20), "lz4"),
    "lz4 named .zst": (b'\x04"M\x18' + bytes(20), "lz4"),
    "lz4 behind a skippable frame": (SKIPPABLE + b'\x04"M\x18' + bytes(20), "lz4"),
    "xz": (lzma.compress(RECORD), "xz"),
    "lzma": (lzma.compress(RECORD, format=lzma.FORMAT_ALONE), "lzma"),
    "bzip2": (bz2.compress(RECORD), "bzip2"),
    "old zstandard": (b"\x27\xb5\x2f\xfd" + bytes(20), "zstandard of before version 0.8"),
    "tar": (tar(), "a tar archive"),
    "old tar": (tar(old=True), "a tar archive"),
    "tar in gzip": (gzip.compress(tar()), "a tar archive"),
    "tar in zstandard": (zstandard.compress(tar()), "a tar archive"),
    "zip": (zipped("a.jsonl"), "a zip archive"),
    "torch.save": (zipped("archive/data.pkl"), r"torch\.save"),
    "npz": (saved(lambda out: np.savez(out, a=np.arange(3))), "npz"),
    "npy": (saved(lambda out: np.save(out, np.arange(3))), "npy"),
    "pickle": (pickle.dumps([1]), "pickle"),
    "Arrow file": (b"ARROW1\x00\x00" + bytes(50), "an Arrow file"),
    "Arrow stream": (b"\xff\xff\xff\xff\x10\x00\x00\x00" + bytes(50), "an Arrow stream"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "safetensors": ((60).to_bytes(8, "little") + b'{"a": {}}', "safetensors"),
    "index of a dataset": (b"MMIDIDX\x00\x00" + bytes(20), "Megatron dataset"),
    "random bytes": (np.random.default_rng(0).bytes(3000), "bytes of an unknown format"),
    "gzip twice": (gzip.compress(gzip.compress(RECORD)), "compressed twice"),
    "UTF-16": ('{"text": "中文"}\n'.encode("utf-16-le"), "iconv"),
    "Latin-1": ("é à\nmore\n".encode("latin1"), "not UTF-8"),
    "array": (json.dumps(RECORDS).encode(), r"one JSON array.*jq -c '\.\[\]'"),
    "short array in a line": (b'[{"text": "a"}, {"text": "b"}]\n', "one JSON array"),
    "array, a record in each line": (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', "one JSON array"),
    "array over lines": (json.dumps(RECORDS, indent=1).encode(), "one JSON array"),
    "array in gzip": (gzip.compress(json.dumps(RECORDS).encode()), "one JSON array"),
    "pretty": ("\n".join(json.dumps(each, indent=2) for each in RECORDS).encode(), r"spread over lines.*jq -c \."),
    "one pretty record": (b'{\n  "text": "abc"\n}\n', "spread over lines"),
    "several in a line": (b'{"text": "a"} {"text": "b"}\n', "several records in a line"),
    "commas": (b'{"text": "a"},\n{"text": "b"},\n', "end in commas"),
    "Python": (b"{'text': 'a', 'n': None}\n", "json.dumps"),
    "text sequence": (b"\x1e" + RECORD, "RFC 7464"),
    "strings": (b'"a"\n"b"\n', "each line is a string"),
    "lists": (b'["a"]\n["b"]\n', "each line is a list"),
    "CR alone": (RECORD.replace(b"\n", b"\r") * 3, "CR alone"),
    "CR alone in zstandard": (zstandard.compress(RECORD.replace(b"\n", b"\r") * 3), "CR alone"),
    "CSV": (b"id,text\n1,hello\n", r"CSV.*columns id, text"),
    "CSV after a mark": (b'\xef\xbb\xbf"id";"text"\r\n1;hello\r\n', r"CSV.*columns id, text"),
    "TSV": (b"id\ttext\n1\thello there\n", "CSV"),
    "plain": (b"hello world\nthis is text, with a comma\n", "plain text"),
    "numbers and words": (b"1\n2\nwords\n", "plain text"),
    "HTML": (b"<!doctype html>\n<p>\n", "XML or HTML"),
}  # fmt: skip
JSON_LINES = {
    "records": RECORD * 3,
    "mark and CRLF": b'\xef\xbb\xbf{"text": "a"}\r\n',
    "one record, CR at its end": b'{"text": "a"}\r',
    "bad first line": b"oops\n" + RECORD,
    "bracket for a first line": b"[\n" + RECORD * 5,
    "cut first line": b'{"text": "cut\n' + RECORD * 5,
    "cut": b'{"text": "cut',
    "first line longer than what is looked at": b'{"text": "' + b"a" * 100_000 + b'"}\n',
    "NaN": b'{"text": "a", "n": NaN}\n',
    "wrong key": b'{"content": "a"}\n',
    "empty": b"",
    "blank": b"\n \r\n\n",
}


@pytest.mark.parametrize("name", NOT_JSON_LINES)
def test_is_named(name: str, tmp_path: Path) -> None:
    content, words = NOT_JSON_LINES[name]
    path = tmp_path / ("a.zst" if name.endswith(".zst") else "a.jsonl")
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        kind_of(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_the_command_that_is_named_makes_json_lines(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path, new = tmp_path / "a name", tmp_path / "NEW.jsonl"
    path.write_bytes(compress(RECORD.replace(b"\n", b"\r") * 3))
    with pytest.raises(UsageError) as caught:
        kind_of(path)
    command = str(caught.value).partition("expected LF: ")[2]
    if command.startswith("zstd") and shutil.which("zstd") is None:
        pytest.skip("no zstd here")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert kind_of(new) == "plain" and new.read_bytes() == RECORD * 3


def test_a_database_is_named(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("create table a(b)")
    with pytest.raises(UsageError, match="SQLite"):
        kind_of(tmp_path / "a")


@pytest.mark.parametrize("name", JSON_LINES)
def test_lines_with_records_are_let_through(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSON_LINES[name])
    assert kind_of(path) == "plain"
    path.write_bytes(gzip.compress(JSON_LINES[name]))
    assert kind_of(path) == "gzip"


def test_a_suffix_that_the_content_belies(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for content in (zstandard.compress(RECORD), RECORD, b""):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match=r"named \.gz"):
            kind_of(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", r"a glob such as 'folder/\*\.jsonl\.zst'"),
        ("empty", r"a glob such as 'empty/\*\.jsonl'"),
        ("-", "standard input; .* write it to a file"),
        ("/dev/null", "not a file; .*pipe"),
        ("s3://bucket/a.jsonl", "an address; .* fetch it"),
        ("nowhere/a.jsonl", "there is no folder nowhere"),
        ("*.nothing", "no file matches it as a glob"),
    ],
)
def test_inputs_that_are_no_files(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("folder/a.jsonl.zst", "folder/b.jsonl.zst", "folder/README", "empty/.hidden.txt"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    with pytest.raises(UsageError, match=words):
        main(["--input", name, "--output-prefix", "o", "--tokenizer-type", "ByteTokenizer"])

"""The budget of bad records: a run that cannot keep it stops early, says why and how to go on, and lists a part."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from megakd.artefacts.manifest import read_manifest
from megakd.data import corpus_shard
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.text.inputs import Input
from megakd.errors import DataBudgetError, UsageError
from megakd.pipeline.preprocess import budget as budget_module
from megakd.pipeline.preprocess.budget import Budget
from megakd.pipeline.preprocess.config import PreprocessConfig
from megakd.pipeline.preprocess.main import main
from megakd.pipeline.preprocess.shards import TextCounts

WRONG = b'{"content": "def f(): pass", "path": "a.py"}\n'
GOOD = b'{"text": "good"}\n'


def preprocess(path: Path, *flags: str) -> int:
    common = ["--input", str(path), "--output-prefix", str(path.parent / "o"), "--tokenizer-type", "ByteTokenizer"]
    return main([*common, *flags])


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "o.quarantine.jsonl").read_bytes().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_wrong_key_stops_the_run_at_once(packed: bool, workers: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    data = WRONG * 100_000
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    flags = ("--workers", workers, "--shard-bytes", "3000000")
    with pytest.raises(DataBudgetError, match=r"the first \d+ records are all bad.*--json-keys content\?") as caught:
        preprocess(path, *flags)
    message = str(caught.value)
    assert "larger budget" not in message and f"first is {path}" in message
    found = int(re.findall(r"the first (\d+) records", message)[0])
    assert 1000 <= found < 60_000
    assert 0 < len(listed(tmp_path)) <= 200
    assert all(data[int(str(record["byte_offset"])) :].startswith(WRONG) for record in listed(tmp_path))

    assert preprocess(path, *flags, "--json-keys", "content", "--strict") == 0
    assert IndexedDataset(tmp_path / "o_content_document").num_documents == 100_000
    assert not (tmp_path / "o.quarantine.jsonl").exists()


def test_every_record_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(WRONG * 3)
    with pytest.raises(
        DataBudgetError, match=r"every one of the 3 records is bad.*\['content', 'path'\]; --json-keys c"
    ):
        preprocess(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match=r"no document in 3 lines.*--json-keys content\?"):
        preprocess(tmp_path / "a.jsonl", "--max-bad-fraction", "1")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (b'{"text": null, "content": "a"}\n', r"'text' is null, expected a string; --json-keys content\?"),
        (b'{"text": ["a"], "title": "ab", "my body": "abc"}\n', r"'text' is a list.*--json-keys 'my body'\?"),
        (b'{"text": {"en": "a"}, "n": 1}\n', r"'text' is an object, expected a string$"),
        (b'{"text": 3}\n', r"'text' is a number, expected a string$"),
        (b'{"TEXT": "a", "bad\\n": "longer", "a/b": "longest"}\n', r"--json-keys TEXT\?"),
        (b'{"n": 1}\n', r"no key 'text' among \['n'\]$"),
    ],
)
def test_the_message_names_the_type_and_the_key_that_is_there(record: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(record * 2)
    with pytest.raises(DataBudgetError, match=words):
        preprocess(tmp_path / "a.jsonl")


def test_one_of_two_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"title": "t", "content": "c"}\n')
    with pytest.raises(DataBudgetError, match=r"no key 'text' .*--json-keys title content\?"):
        preprocess(tmp_path / "a.jsonl", "--json-keys", "title", "text")


def test_a_file_with_other_keys_than_the_rest_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 10)
    (tmp_path / "b.jsonl").write_bytes(WRONG * 10)
    with pytest.raises(
        DataBudgetError, match=rf"10 of 20.*every record of {tmp_path}/b\.jsonl is bad \(1 file.*larger"
    ):
        preprocess(tmp_path / "?.jsonl")


def test_a_budget_that_cannot_be_kept_ends_the_run_and_a_larger_one_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget_module, "WORTH_STOPPING_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    long = b'{"text": "' + b"words " * 2000 + b'"}\n'
    path.write_bytes((long * 9 + WRONG) * 100)
    flags = ("--workers", "1", "--shard-bytes", "1000000")
    with pytest.raises(
        DataBudgetError, match=r"of \d+ records are bad so far.*left to read.*a larger budget .* contin"
    ):
        preprocess(path, *flags, "--max-bad-fraction", "0.0001")
    assert 0 < len(listed(tmp_path)) < 100
    assert preprocess(path, *flags, "--max-bad-fraction", "0.2") == 0
    assert "continuing the unfinished run" in capsys.readouterr().err
    assert len(listed(tmp_path)) == 100
    assert read_manifest(tmp_path / "o_text_document.manifest.json").parameters["counts"]["documents"] == 900


def test_the_list_is_capped_and_the_rest_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((GOOD + WRONG) * 12_000)
    with pytest.raises(DataBudgetError, match=r"12000 of 24000 .*; the first 10000 are in"):
        preprocess(path, "--shard-bytes", "300000")
    assert [record["line"] for record in listed(tmp_path)] == list(range(2, 20_001, 2))
    assert corpus_shard.LISTED == 10_000


def make_budget(fraction: float, *inputs: tuple[str, int], shard_bytes: int = 1 << 24) -> Budget:
    config = PreprocessConfig(input=["a"], output_prefix="o", tokenizer_type="ByteTokenizer", max_bad_fraction=fraction)
    files = [Input(f"{i}.jsonl", kind, size, 0) for i, (kind, size) in enumerate(inputs)]  # type: ignore[arg-type]
    return Budget(config, files, shard_bytes)


def report(documents: int, bad: int, position: int, *, ended: bool = False) -> dict[str, object]:
    return {"documents": documents, "bad_records": bad, "position": position, "ended": ended, "bad": []}


def test_what_is_left_may_still_dilute_what_was_bad() -> None:
    """The shortest record, {"text":""} and its line end, has 12 bytes: 100 MB hold 8,333,333 of them."""
    for bad, stops in ((820, False), (840, True)):
        budget = make_budget(0.0001, ("plain", 100_000_000), shard_bytes=100_000_000)
        if stops:
            with pytest.raises(DataBudgetError, match="so far"):
                budget.add({"file": 0, "shard": 0}, report(100, bad, 300_000))
        else:
            budget.add({"file": 0, "shard": 0}, report(100, bad, 300_000))


def test_nobody_knows_what_a_compressed_file_holds() -> None:
    budget = make_budget(0.001, ("zstd", 1_000_000_000), ("plain", 20_000_000))
    budget.add({"file": 0, "shard": 0}, report(1, 10_000_000, 999_999_999))  # its last byte may hold the most
    with pytest.raises(DataBudgetError, match="20 MB"):
        budget.add({"file": 0, "shard": 0}, report(1, 1, 1_000_000_000, ended=True))


def test_a_thousand_bad_records_and_one_good() -> None:
    sizes = ("plain", 100_000_000)
    budget = make_budget(0.5, sizes)
    budget.add({"file": 0, "shard": 0}, report(0, 999, 100))
    with pytest.raises(DataBudgetError, match="first 1000 records are all bad"):
        budget.add({"file": 0, "shard": 1}, report(0, 1, 100))
    budget = make_budget(0.5, sizes)
    budget.add_finished(0, 0, TextCounts(documents=1), ended=False)
    budget.add({"file": 0, "shard": 1}, report(0, 5000, 100))
    budget = make_budget(1.0, sizes)  # whatever comes
    budget.add({"file": 0, "shard": 0}, report(0, 5000, 100))

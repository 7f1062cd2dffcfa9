"""Results that exist: the same command changes nothing and says so, a different one is refused with both values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.select.select_corpus import Corpus
from runs import write_dataset

from megakd.errors import DataBudgetError, MismatchError
from megakd.pipeline.datasets import merge, pack
from megakd.pipeline.preprocess import main as preprocess
from megakd.pipeline.report import main as report
from megakd.pipeline.retokenize import main as retokenize
from megakd.pipeline.select import main as select

Main = Callable[[list[str]], int]
KEPT = "complete already, made of the same inputs with the same parameters"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def check_kept(main: Main, words: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command makes something, and then, as it says, nothing more."""
    command = [str(word) for word in words]
    assert main(command) == 0
    assert KEPT not in capsys.readouterr().err
    before = contents(folder)
    assert main(command) == 0
    assert KEPT in capsys.readouterr().err
    assert contents(folder) == before


def check_refused(main: Main, words: list[Any], folder: Path, told: str) -> None:
    before = contents(folder)
    with pytest.raises(MismatchError, match=told) as caught:
        main([str(word) for word in words])
    assert "Give another" in str(caught.value)
    assert contents(folder) == before


@pytest.fixture
def corpus(tmp_path: Path) -> list[Any]:
    """The flags of preprocess."""
    for name, count in (("a", 30), ("b", 40)):
        lines = [json.dumps({"text": f"{name} {i}", "title": "t"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return ["--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "o", "--tokenizer-type", "ByteTokenizer"]


def test_preprocess(corpus: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_kept(preprocess.main, corpus, tmp_path, capsys)
    check_refused(preprocess.main, [*corpus, "--append-eod"], tmp_path, "append_eod: False there, True here.*-prefix")
    others = [*corpus[:2], tmp_path / "b.jsonl", *corpus[2:]]
    check_refused(preprocess.main, others, tmp_path, r"b\.jsonl: none there, an input here")
    null = [*corpus[:-1], "NullTokenizer", "--vocab-size", "7"]
    check_refused(preprocess.main, null, tmp_path, "tokenizer: .* there, .* here")
    (tmp_path / "a.jsonl").write_text('{"text": "other words"}\n' * 30)
    check_refused(preprocess.main, corpus, tmp_path, r"a\.jsonl: [0-9a-f]{32} there, [0-9a-f]{32} here")


def test_preprocess_makes_the_keys_that_are_not_there(corpus: list[Any], tmp_path: Path) -> None:
    words = [str(word) for word in [*corpus, "--json-keys", "text", "title"]]
    assert preprocess.main(words) == 0
    first = contents(tmp_path)
    for file in tmp_path.glob("o_title_document.*"):
        file.unlink()
    assert preprocess.main(words) == 0
    assert {path: data for path, (data, _) in contents(tmp_path).items()} == {p: data for p, (data, _) in first.items()}


def test_a_smaller_budget_than_the_dataset_was_made_with(corpus: list[Any], tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("\nbroken\n")
    words = [str(word) for word in [*corpus, "--max-bad-fraction", "0.5"]]
    assert preprocess.main(words) == 0
    with pytest.raises(DataBudgetError, match="1 of 31 records were bad when it was made, more than --strict"):
        preprocess.main([*words, "--strict"])


def test_files_that_are_lost_are_made_again(
    corpus: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(word) for word in corpus]
    assert preprocess.main(words) == 0
    whole = (tmp_path / "o_text_document.bin").read_bytes()
    (tmp_path / "o_text_document.bin").write_bytes(whole[:-1])
    assert preprocess.main(words) == 0
    assert "it is made again" in capsys.readouterr().err
    assert (tmp_path / "o_text_document.bin").read_bytes() == whole


def test_a_dataset_of_another_program(corpus: list[Any], tmp_path: Path) -> None:
    write_dataset(tmp_path / "o_text_document")
    (tmp_path / "o_text_document.manifest.json").unlink()
    check_refused(preprocess.main, corpus, tmp_path, "a dataset without a manifest lies there")


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (write_dataset(tmp_path / name, num_tokens=500, seed=i) for i, name in enumerate("abc"))
    flags = ["--output-prefix", tmp_path / "o", "--input-prefix", a, b]
    check_kept(merge.main, flags, tmp_path, capsys)
    check_refused(merge.main, [*flags, c], tmp_path, "input 2: none there")
    check_refused(merge.main, flags[:-1], tmp_path, "input 1: .* there, none here")


def test_retokenize(corpus: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess.main([str(word) for word in corpus])
    flags = ["--input-prefix", tmp_path / "o_text_document", "--output-prefix", tmp_path / "new"]
    flags += ["--tokenizer-type", "ByteTokenizer"]
    check_kept(retokenize.main, flags, tmp_path, capsys)
    check_refused(retokenize.main, [*flags, "--append-eod", "false"], tmp_path, "append_eod: True there, False here")


def test_pack(corpus: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preprocess.main([str(word) for word in corpus])
    flags = [tmp_path / "o_text_document", "--seq-length", "16"]
    check_kept(pack.main, flags, tmp_path, capsys)
    for file in tmp_path.glob("o_*"):
        if "sentence" not in file.name:
            file.unlink()
    corpus[1] = tmp_path / "b.jsonl"
    preprocess.main([str(word) for word in corpus])
    check_kept(pack.main, flags, tmp_path, capsys)  # of what the dataset was before: made anew


def test_select(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = Corpus(tmp_path, [60, 50], 3)
    flags = scores.flags()
    check_kept(select.main, flags, tmp_path, capsys)
    check_refused(select.main, [*flags, "--ratio", "0.25"], tmp_path, r"rule\.ratio: 0\.5 there, 0\.25 here")
    check_refused(select.main, [*flags, "--teacher-scale", "0.3"], tmp_path, r"rule\.weights\.teacher: -1\.0 there, -0")
    others = Corpus(tmp_path, [60, 50], 4)
    assert not np.array_equal(others.teacher[0], scores.teacher[0])
    check_refused(select.main, flags, tmp_path, "scores teacher: .* there, .* here")


def test_report(tmp_path: Path) -> None:
    flags = Corpus(tmp_path, [60], 3).flags()
    flags[-1] = tmp_path / "page"
    words = [str(word) for word in flags]
    assert report.main(words) == 0
    check_refused(report.main, [*words, "--ratio", "0.25"], tmp_path, "ratio: None there, 0.25 here")
    Corpus(tmp_path, [60], 4)
    check_refused(report.main, words, tmp_path, "scores teacher: .* there, .* here")

"""Inputs and outputs in folders whose names are not UTF-8, and datasets that were moved: the same artefacts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pipeline.report.report_corpus import Corpus
from pipeline.score.score_runs import run_score, run_some
from runs import make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.__main__ import main
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.scores.artefact import Scores
from megakd.pipeline.report import main as report

NAME = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).mkdir()
    return tmp_path / NAME


def test_preprocess(folder: Path, capfd: Any) -> None:
    lines = [json.dumps({"text": f"text {i}"}) for i in range(30)]
    (folder / f"{NAME}.jsonl").write_text("\n".join([*lines, "broken"]))
    words = ["--input", f"{folder}/{NAME}.jsonl", "--output-prefix", f"{folder}/out{NAME}", "--max-bad-fraction", "0.5"]
    assert main(["preprocess", *words, "--tokenizer-type", "ByteTokenizer", "--workers", "1"]) == 0, capfd.readouterr()
    (record,) = map(json.loads, (folder / f"out{NAME}.quarantine.jsonl").read_bytes().splitlines())
    assert record["file"].endswith("caf\\udce9.jsonl") and record["line"] == 31
    dataset = IndexedDataset(f"{folder}/out{NAME}_text_document")
    assert dataset.num_documents == 30 and dataset.manifest is not None
    words = ["--input-prefix", f"{dataset.prefix}", "--output-prefix", f"{folder}/again", "--workers", "1"]
    assert main(["retokenize", *words, "--tokenizer-type", "ByteTokenizer"]) == 0, capfd.readouterr()
    assert main(["verify", f"{folder}/again", f"{dataset.prefix}"]) == 0


def test_select_and_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    corpus = Corpus(folder)
    corpus.select("--data-path", folder / "data.bin", "--materialize", folder / NAME)
    assert corpus.report("--selection", folder / "kept", "--data-path", folder / "data.idx")
    assert "caf\\udce9" in (folder / "out" / "report.html").read_text()
    assert main(["show", f"{folder}/kept"]) == main(["verify", f"{folder}/kept", f"{folder}/{NAME}"]) == 0


@pytest.mark.slow
def test_a_dataset_that_was_moved_is_taken_by_its_fingerprint(world: Worlds, tmp_path: Path) -> None:
    """A run and scores go on with it, and what was made from it still goes with it."""
    old, run = write_dataset(tmp_path / "old", num_tokens=1200), str(tmp_path / "run")
    tree = make_tree(old, training={"train_iters": 2}, checkpoint={"save": run})
    assert world(1).run(run_training, tree) == [0]
    more: dict[str, Any] = {"seq_length": 16, "micro_batch_size": 4, "range_samples": 20, "log_interval": 0.0}
    score = {"load": run, "iteration": 2, "data_path": old, "output": str(tmp_path / "s"), **more}
    assert world(1).run(run_some, score, 1) == [20]
    (tmp_path / "else").mkdir()
    for path in list(tmp_path.glob("old.*")):
        path.rename(tmp_path / "else" / path.name.replace("old", "new"))
    new = str(tmp_path / "else" / "new")
    tree["training"]["train_iters"] = 4
    assert world(1).run(run_training, {**tree, "data": {**tree["data"], "data_path": [new]}}) == [0]
    assert world(1).run(run_score, {**score, "data_path": f"{new}.idx"}) == [0]
    scored = Scores(tmp_path / "s", expect_dataset=IndexedDataset(new).fingerprint)
    assert scored.num_samples == 74
    second = {**score, "iteration": 4, "data_path": str(tmp_path / "else"), "output": str(tmp_path / "t")}
    assert world(1).run(run_score, second) == [0]
    flags = ["--teacher-scores", str(tmp_path / "t"), "--reference-scores", str(tmp_path / "s")]
    assert main(["select", *flags, "--output", str(tmp_path / "kept"), "--data-path", new]) == 0

"""The demo's own parts: its corpus and its report. Whole runs are what `make demo` is for."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pipeline.select.select_twin import write as write_scores
from run_folder.run_folders import HELD_OUT, evaluation, write_lines, write_run

from megakd.config.tree import parse
from megakd.logits.codec import Rows, identity_ranks
from megakd.logits.spec import StoreSpec
from megakd.logits.store_writer import finish_store, write_shard
from megakd.pipeline.capture.preflight import CaptureConfig
from megakd.pipeline.datasets.describe import describe_artefact
from megakd.pipeline.score.preflight import ScoreConfig
from megakd.pipeline.select.config import SelectConfig
from megakd.train.config import TrainConfig

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_corpus_is_split_by_file_the_same_every_time() -> None:
    corpus = load("corpus")
    documents = list(corpus.documents())
    names = [document.name for document in documents]
    assert names == [document.name for document in corpus.documents()]
    assert len(set(names)) == len(names) and len({document.text for document in documents}) == len(documents)
    share = sum(document.held_out for document in documents) / len(documents)
    assert 0.02 < share < 0.10
    assert not [name for name in names if "test" in name.split("/")[:-1] or name.startswith(("site-", "dist-"))]


@pytest.mark.slow
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


def test_parts_share_no_document(tmp_path: Path) -> None:
    corpus = load("corpus")
    lines = [json.dumps({"text": "x", "source": f"package/module_{n}.py"}) + "\n" for n in range(400)]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    parts = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert "documents" in corpus.write_parts(tmp_path / "train.jsonl", *parts, of=2)
    found = [part.read_text().splitlines(keepends=True) for part in parts]
    assert sorted(found[0] + found[1]) == sorted(lines) and 150 < len(found[0]) < 250
    (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))  # what else there is decides nothing
    corpus.write_parts(tmp_path / "train.jsonl", *parts, of=2)
    assert sorted(found[0]) == sorted(parts[0].read_text().splitlines(keepends=True))


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("report")
    monkeypatch.setattr(
        report, "bytes_per_token", lambda folder: {"store-top-k": 90.25, "store-sampled": 36.5}[folder.name]
    )
    whole = {**HELD_OUT, "num_tokens": 5000}
    for name in ("teacher", "reference"):
        write_run(tmp_path / name, {4: 3.0}, held_out=whole, values={"bits_per_byte": 1.25})
        write_scores(tmp_path / f"scores-{name}", [-1.0], [1])
    for number, name in enumerate(report.STUDENTS):
        write_run(tmp_path / name, {2: 9.0, 4: 4.5 - number / 4}, config={"objective": {"kd_alpha": number / 8}})
        (tmp_path / f"{name}-held-out").mkdir()
        valid = {"agreement": 0.5 + number / 16, "calibration_error": 0.01 * number}
        write_lines(tmp_path / f"{name}-held-out", [evaluation(0, 4.0 - number / 4, whole, valid)])
    text = report.write(tmp_path, seed=7)
    rows = {
        line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line[:2] == "| "
    }
    titles = {name: student.title for name, student in report.STUDENTS.items()}
    # held-out loss, less the student alone, bits per byte, agreement, calibration, tokens, tokens/s, tokens to 4.5
    assert rows[titles["plain"]][:8] == ["4.0000", "", "", "50.0%", "0.00%", "400", "200", "400"]
    assert rows[titles["sampled"]][:5] == ["3.2500", "-0.7500", "", "68.8%", "3.00%"]
    assert rows[report.TEACHER][:7] == ["3.0000", "-1.0000", "1.2500", "", "", "400", "200"]
    assert (
        "student alone" in text
        and "- Bytes a token of the logits stores: store-sampled 36.5, store-top-k 90.2." in text
    )
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["seed"] == 7 and figures["store_bytes_per_token"]["store-top-k"] == 90.25
    assert [group["label"] for group in figures["groups"]] == [*titles.values(), report.TEACHER]
    assert (tmp_path / "table.md").read_text().strip() in text


def test_bytes_of_a_store_are_those_that_show_says(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    spec = StoreSpec("top_p_k", 7, "concat", 5, 3, 2, {"dataset": "d", "model": "m"}, top_k=2)
    ranks = identity_ranks(7)
    rng = np.random.default_rng(0)
    for number in range(spec.num_shards):
        writer = write_shard(folder, spec, ranks, number)
        for sample in range(*spec.samples_of(number)):
            log_probs = np.log(rng.dirichlet(np.ones(3), 5)[:, :2]).astype(np.float32)
            ids = np.tile(np.array([1, 4]), (5, 1))
            writer.add(sample, np.arange(5), Rows(ids, -np.sort(-log_probs, 1), np.ones(5, np.float32)))
        writer.commit()
    finish_store(folder, spec, ranks)
    (shown,) = [line for line in describe_artefact(folder / "store.json") if line.startswith("rows")]
    assert f", {load('report').bytes_per_token(folder):.1f} bytes a token" in shown


def test_configurations_of_the_demo_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command line of a demo that finds nothing done, without running any."""
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(DEMO.parent.parent)
    monkeypatch.setenv("DEMO_OUT", str(tmp_path))
    demo = importlib.import_module("demo")
    commands: list[list[str]] = []
    monkeypatch.setattr(demo, "begin", lambda: None)
    monkeypatch.setattr(demo, "prepare_text", lambda text: None)
    monkeypatch.setattr(demo, "prepare_parts", lambda text: None)
    monkeypatch.setattr(demo.report, "largest_difference", lambda one, other: 0.0)
    monkeypatch.setattr(demo.report, "write", lambda runs, *, seed: f"seed {seed}")
    for runner in ("megakd", "megakd_on_two_ranks"):
        monkeypatch.setattr(demo, runner, lambda name, done, verb, *flags: commands.append([verb, *map(str, flags)]))
    monkeypatch.setattr(
        demo, "megakd_two_at_once", lambda stages: commands.extend([*map(str, stage.words)] for stage in stages)
    )
    demo.main()
    verbs: dict[str, Any] = {
        "train": TrainConfig,
        "capture": CaptureConfig,
        "score": ScoreConfig,
        "select": SelectConfig,
    }
    for verb, *flags in commands:
        parse(verbs[verb], flags, prog=verb, description="")
    # an evaluation takes weights alone: it does not go on with the order of a selection
    assert all("--finetune" in command for command in commands if "--skip-train" in command)
    assert set(demo.students(demo.Demo(1, 1, tmp_path))) == set(demo.report.STUDENTS)
    assert Counter(command[0] for command in commands) == {"train": 16, "capture": 2, "score": 1, "select": 1}


def test_two_at_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own output in one piece, in order; the first that fails ends the rest."""
    monkeypatch.syspath_prepend(str(DEMO))
    stages = importlib.import_module("stages")
    help_of = [stages.Stage(verb, done, (verb, "--help")) for verb, done in (("show", False), ("merge", True))]
    stages.megakd_two_at_once(help_of)
    printed = capfd.readouterr().out
    assert printed.startswith("\n== show\n\n== merge: done\n\n== show\n$ ") and "usage: megakd show" in printed
    assert "usage: megakd merge" not in printed
    with pytest.raises(SystemExit, match=r"(?s)== nothing\n\$ .*ended with status 2; what is finished is kept"):
        stages.megakd_two_at_once([stages.Stage("nothing", False, ("show", "--no-such-flag")), *help_of])


def test_largest_difference(tmp_path: Path) -> None:
    report = load("report")
    for name, losses in (("a", [6.0, 4.0, 3.0]), ("b", [6.0, 4.25])):
        lines = [
            {"step": n, "tokens": n, "lm_loss": loss, "kd_loss": 1.0, "seconds": 0.5}
            for n, loss in enumerate(losses, 1)
        ]
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name, lines)
    assert report.largest_difference(tmp_path / "a", tmp_path / "b") == pytest.approx(0.25)
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step in common"):
        report.largest_difference(tmp_path / "a", tmp_path / "b")

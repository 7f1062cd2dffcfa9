"""``show``: its numbers are those of the dataset."""

import fcntl

import numpy as np
import pytest
from pipeline.select.select_corpus import Corpus
from pipeline.select.select_corpus import run as select
from pipeline.select.select_twin import write as write_scores
from run_folder.run_folders import write_checkpoint, write_run

from megakd.__main__ import run
from megakd.data.indexed.dataset import IndexedWriter
from megakd.data.selection import Selection
from megakd.data.tokenizer import ByteTokenizer
from megakd.errors import ExitStatus
from megakd.pipeline.datasets import describe as show_artefact
from megakd.pipeline.datasets import pack, show


@pytest.fixture
def prefix(tmp_path):
    tokenizer = ByteTokenizer()
    texts = ["hello world", "", "x" * 100]
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for text in texts:
            writer.add_documents(np.array(tokenizer.encode(text), dtype=np.uint16), np.array([len(text)]))
        writer.finish(tokenizer=tokenizer.describe(), parents={"corpus": "abc"}, parameters={"append_eod": False})
    return tmp_path / "d"


def run_show(*arguments):
    return run(show.main, [str(argument) for argument in arguments])


def test_numbers(prefix, capsys):
    assert run_show(prefix, "--documents", 9) == ExitStatus.COMPLETE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in (
        ["documents", "3"],
        ["tokens", "111"],
        ["dtype", "uint16"],
        ["largest", "token", "id", str(ord("x"))],
        ["append_eod", "False"],
        ["parent", "corpus", "abc"],
    ):
        assert line in lines


def test_documents_as_ids_and_as_text(prefix, capsys):
    run_show(prefix, "--documents", 2)
    assert "document 0: 104 101 108" in capsys.readouterr().out
    assert run_show(prefix, "--documents", 3, "--tokenizer-type", "ByteTokenizer") == ExitStatus.COMPLETE
    out = capsys.readouterr().out
    assert "document 0: 'hello world'\n" in out and "document 1: ''\n" in out
    assert f"document 2: '{'x' * 64}' ... (100 tokens)" in out


def test_another_tokenizer_is_refused(prefix, capsys):
    assert run_show(prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", 500) == ExitStatus.MISMATCH
    assert "ByteTokenizer" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*no manifest")
def test_without_a_manifest(prefix, capsys):
    prefix.with_name("d.manifest.json").unlink()
    assert run_show(prefix) == ExitStatus.COMPLETE
    assert "not recorded" in capsys.readouterr().out
    assert run_show(prefix, "--tokenizer-type", "NullTokenizer", "--vocab-size", 50) == ExitStatus.MISMATCH
    assert f"token id {ord('x')}, the tokenizer has 51" in capsys.readouterr().err


def test_wrong_arguments(tmp_path, prefix):
    assert run_show(tmp_path / "none") == ExitStatus.USAGE
    assert run_show(prefix, "--documents", -1) == ExitStatus.USAGE


def test_histogram_counts_every_document_in_its_class():
    lengths = np.array([0, 0, 1, 2, 3, 4, 7, 8, 2**31 - 1])
    lines = show.histogram(lengths)[2:]
    found = {(int(line.split()[0]), int(line.split()[2])): int(line.split()[3]) for line in lines}
    assert sum(found.values()) == len(lengths)
    assert found == {
        (low, high): int(((lengths >= low) & (lengths <= high)).sum()) for low, high in found
    }  # fmt: skip
    assert found[(0, 0)] == 2 and found[(4, 7)] == 2 and found[(2**30, 2**31 - 1)] == 1
    assert show.histogram(lengths[:0]) == []


def shown(capsys, *arguments):
    """Printed values, by their names in the first column."""
    assert run_show(*arguments) == ExitStatus.COMPLETE
    lines = capsys.readouterr().out.splitlines()
    return {line[:18].strip(): line[18:].strip() for line in lines}


def test_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(show_artefact, "_AT_ONCE", 2)
    write_scores(
        tmp_path / "s", [-2.0, -9.0, 0.0, -np.inf, -1.0], [1, 3, 0, 2, 4], dataset="the data", model="the model"
    )
    rows = shown(capsys, tmp_path / "s")
    assert (
        rows["artefact"] == "megakd-scores, version 1" and rows["samples"] == "5" and rows["not finite"] == "1 samples"
    )
    assert rows["scored samples"] == "3 (1 have nothing to score)" and rows["scored tokens"] == "8"
    assert rows["mean NLL"] == "1.5000 nats a token, 1.7500 as the mean of samples"  # 12 / 8; (2 + 3 + 1/4) / 3
    assert (rows["parent dataset"], rows["parent model"], rows["mask_policy"]) == ("the data", "the model", "all")
    sampled = {"fraction": 0.5, "seed": 1, "num_scored": 1}
    write_scores(tmp_path / "part", [-2.0, np.nan], [1, 0], sampled=sampled)
    rows = shown(capsys, tmp_path / "part")
    assert rows["scored samples"] == "1 (1 were not sampled, or have nothing to score)"
    assert rows["sampled"] == "fraction 0.5, num_scored 1, seed 1"
    assert run_show(tmp_path / "s", "--documents", 1) == ExitStatus.USAGE
    assert "which this is not" in capsys.readouterr().err


def test_selection(tmp_path, capsys):
    corpus = Corpus(tmp_path, [80], 9, levels=9)
    (kept,) = select(*corpus.flags(), "--ratio", 0.25)
    rows = shown(capsys, tmp_path / "out-d0")
    assert rows["kept"] == f"{len(kept)} ({len(kept) / 0.8:.2f} %)" and rows["parent dataset"] == "d0"
    assert (rows["rule ratio"], rows["rule normalise"]) == ("0.25", "token")
    domain = Selection(tmp_path / "out-d0").manifest.parameters["rule"]["domains"]["out-d0"]
    assert rows["domain out-d0"].startswith(f"{len(kept)} of {domain['candidates']} candidates kept (")
    assert rows["domain out-d0"].endswith(f"scores from {domain['threshold']:.6g} on")


def test_other_artefacts_show_what_they_record(prefix, capsys):
    run(pack.main, [str(prefix), "--seq-length", "30"])
    capsys.readouterr()
    rows = shown(capsys, f"{prefix}.sentence-30")
    assert rows["artefact"] == "megakd-packing, version 1" and rows["seq_length"] == "30" and "parent dataset" in rows


def test_a_training_run(tmp_path, capsys):
    folder = write_run(tmp_path / "run", {2: 5.0, 4: 4.5}, train_iters=9, values={"bits_per_byte": 1.25})
    write_checkpoint(folder, 2)
    write_checkpoint(folder, 4)
    rows = shown(capsys, folder)
    assert rows["artefact"] == "training run" and rows["steps"] == "4 of 9" and rows["tokens"] == "400"
    assert rows["state"] == "not complete; no process of this machine is training it"
    assert rows["teacher"] == "none" and rows["data"] == "text" and rows["held-out data"] == "held"
    assert rows["step 4"] == "lm loss 5.0000, total loss 5.0000"
    assert rows["evaluations"] == "2" and rows["at step 4"] == "lm loss 4.5, num tokens 800, bits per byte 1.25"
    assert rows["checkpoints"] == "2 4" and rows["continues from"] == "iteration 4"
    rows = shown(capsys, folder / "iter_0000004")
    assert rows["artefact"] == "megakd-checkpoint, version 1" and rows["iteration"] == "4"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert shown(capsys, folder)["state"] == "a process of this machine is training it"
    (folder / "metrics.jsonl").unlink()
    (folder / "config.yaml").unlink()
    rows = shown(capsys, folder)  # a folder of checkpoints alone, such as a copied teacher
    assert (
        rows["state"] == "checkpoints without the record of their training" and rows["continues from"] == "iteration 4"
    )
    assert run_show(folder, "--documents", 1) == ExitStatus.USAGE

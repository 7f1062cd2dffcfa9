"""``megakd compare``: what runs came to, held against one another only where that means something."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from pipeline.select.select_twin import write as write_scores
from run_folder.run_folders import HELD_OUT, evaluation, write_checkpoint, write_lines, write_run

from megakd.__main__ import run
from megakd.artefacts.manifest import write_manifest
from megakd.data.selection import SelectionWriter
from megakd.errors import ExitStatus
from megakd.logits.spec import FORMAT, VERSION
from megakd.logits.spec import MANIFEST as STORE
from megakd.model.checkpoint.record import read_record
from megakd.pipeline.compare import main as compare
from megakd.run_folder.costs import Known
from megakd.run_folder.figures import reached
from megakd.run_folder.record import read_run


def run_compare(*words: Any) -> int:
    return run(compare.main, [str(word) for word in words])


def compared(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    """What ``--json`` prints, its groups by label."""
    capsys.readouterr()
    assert run_compare(*words, "--json") == ExitStatus.COMPLETE
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {**result, "groups": {group["label"]: group for group in result["groups"]}}


def figures(result: dict[str, Any], label: str) -> dict[str, float]:
    return {name: found["mean"] for name, found in result["groups"][label]["figures"].items()}


def test_a_teacher_against_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_run(tmp_path / "plain", {1: 6.0, 2: 5.0, 4: 4.0}, values={"bits_per_byte": 1.0})
    online = write_run(
        tmp_path / "online",
        {1: 5.0, 2: 4.5, 4: 3.5},
        teacher_flops=200.0,
        config={"teacher": {"load": str(tmp_path / "teacher")}},
        values={"bits_per_byte": 0.5, "agreement": 0.75, "calibration_error": 0.125},
    )
    result = compared(capsys, plain, online)
    assert result["baseline"] == "plain" and result["target"] == 4.0 and result["notes"] == []
    own = figures(result, "online")
    # 4.5 after 200 tokens, 3.5 after 400: 4.0 half way between; 6 FLOPs a token of its own, 2 of the teacher
    assert own["tokens_to_target"] == 300 and own["tokens"] == 400
    assert (own["flops"], own["all_flops"]) == (2400, 3200)
    assert (own["flops_to_target"], own["all_flops_to_target"]) == (1800, 2400)
    assert own["tokens_per_second"] == 200 and own["agreement"] == 0.75
    assert result["groups"]["online"]["difference"] == {"mean": -0.5, "sd": None, "n": 1, "by_seed": True}
    assert figures(result, "plain")["tokens_to_target"] == 400

    table, plot = tmp_path / "new" / "table.csv", tmp_path / "new" / "plot.png"
    assert run_compare(plain, online, "--csv", table, "--plot", plot, "--target-loss", "4.25") == ExitStatus.COMPLETE
    printed = capsys.readouterr().out
    assert "| online | 3.5000 | -0.5000 | 0.5000 | 75.0% | 12.50% | 400 | 200 | 250 |" in printed
    assert "Counted up to a held-out LM loss, nats a token, of 4.2500" in printed
    rows = {row["label"]: row for row in csv.DictReader(io.StringIO(table.read_text()))}
    assert float(rows["online"]["difference"]) == -0.5 and float(rows["online"]["tokens_to_target"]) == 250
    assert rows["plain"]["difference"] == "" and plot.read_bytes().startswith(b"\x89PNG")


def test_seeds_are_one_group_and_differences_are_taken_seed_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, online = {1: 4.0, 2: 4.5, 3: 5.0}, {1: 3.5, 2: 3.75, 5: 9.0}
    words = [write_run(tmp_path / f"plain-seed-{seed}", {4: loss}, seed=seed) for seed, loss in plain.items()]
    for seed, loss in online.items():
        words.append(
            write_run(
                tmp_path / f"online-seed-{seed}",
                {4: loss},
                seed=seed,
                config={"teacher": {"load": str(tmp_path / f"teacher-{seed}" / "run")}},
            )
        )
    result = compared(capsys, *words)
    assert list(result["groups"]) == ["plain", "online"]
    assert result["groups"]["plain"]["figures"]["lm_loss"] == {"mean": 4.5, "sd": 0.5, "n": 3}
    change = result["groups"]["online"]["difference"]  # -0.5 and -0.75 at seeds 1 and 2; 3 and 5 have no partner
    assert change["n"] == 2 and change["mean"] == pytest.approx(-0.625)
    assert change["sd"] == pytest.approx(0.125 * 2**0.5)
    assert run_compare(*words) == ExitStatus.COMPLETE
    assert "| plain, 3 runs | 4.5000 ± 0.5000 |  | 400 | 200 | 400 (2 of 3 runs) |" in (
        printed := capsys.readouterr().out
    )
    assert "-0.6250 ± 0.1768 (n = 2)" in printed
    # what differs in more than seed and paths, and what the user names, stands apart
    other = write_run(tmp_path / "alpha", {4: 3.0}, seed=9, config={"objective": {"kd_alpha": 0.5}})
    result = compared(capsys, *words[:2], other, f"mine={words[2]}", "--baseline", "mine")
    assert list(result["groups"]) == ["plain", "alpha", "mine"] and result["baseline"] == "mine"
    assert result["groups"]["plain"]["difference"]["by_seed"] is False


def test_runs_of_one_seed_on_other_folders_are_no_repetitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        write_run(tmp_path / name, {4: 4.0}, config={"teacher": {"load": str(tmp_path / name / "teacher")}})
        for name in ("small", "large")
    ]
    result = compared(capsys, *words, f"{words[0]}/../small")
    assert list(result["groups"]) == ["small", "large"] and len(result["groups"]["small"]["runs"]) == 1


@pytest.mark.parametrize(
    "held_out",
    [{**HELD_OUT, "fingerprint": "0" * 32}, {**HELD_OUT, "num_tokens": 1600}],
    ids=["other data", "another size"],
)
def test_other_held_out_data_are_said_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], held_out: dict[str, Any]
) -> None:
    plain = write_run(tmp_path / "plain", {2: 5.0, 4: 4.0})
    other = write_run(tmp_path / "other", {2: 4.0, 4: 3.0}, held_out=held_out, config={"student": {"num_layers": 3}})
    result = compared(capsys, plain, other)
    assert result["groups"]["other"]["difference"] is None
    assert "tokens_to_target" not in figures(result, "other") and figures(result, "other")["lm_loss"] == 3.0
    assert any("evaluated on other held-out data than plain" in note for note in result["notes"])


def test_other_tokenizers_compare_by_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_run(tmp_path / "plain", {2: 5.0, 4: 4.0}, values={"bits_per_byte": 1.0})
    held_out = {"fingerprint": "0" * 32, "num_tokens": 400, "num_bytes": 3190, "tokenizer": "u" * 32}
    other = write_run(tmp_path / "other", {4: 7.0}, held_out=held_out, values={"bits_per_byte": 0.75})
    result = compared(capsys, plain, other)
    assert result["metric"] == "bits_per_byte" and result["target"] == 1.0
    assert result["groups"]["other"]["difference"]["mean"] == -0.25 and "lm_loss" not in figures(result, "other")
    assert "other: evaluated on 3190 bytes of text, plain on 3200." in result["notes"]


def test_bytes_counted_by_other_rules_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = {"bytes_of": "documents"}
    old = write_run(tmp_path / "old", {4: 4.0}, values={"bits_per_byte": 1.0})
    new = write_run(tmp_path / "new", {4: 4.0}, held_out=HELD_OUT | now, values={"bits_per_byte": 1.5})
    other = HELD_OUT | now | {"tokenizer": "u" * 32}
    lossy = write_run(tmp_path / "lossy", {4: 7.0}, held_out=other, values={"bits_per_byte": 0.75})
    older = write_run(tmp_path / "older", {4: 7.0}, held_out={**HELD_OUT, "tokenizer": "v" * 32})
    rules = "new{}: those of the original text; old: those that ids decode to, as older versions did); evaluate anew."
    result = compared(capsys, old, new)  # one tokenizer: losses compare all the same
    assert result["groups"]["new"]["difference"]["mean"] == 0.0
    assert any(note.endswith(rules.format("")) for note in result["notes"])
    result = compared(capsys, old, new, lossy)
    assert result["metric"] == "bits_per_byte"
    assert [result["groups"][name]["difference"] for name in ("new", "lossy")] == [None, None]
    assert any(note.endswith(rules.format(", lossy")) for note in result["notes"])
    assert not any("other held-out data" in note for note in result["notes"])
    result = compared(capsys, new, lossy)
    assert result["groups"]["lossy"]["difference"]["mean"] == -0.75
    assert not any("Bytes" in note or "rules" in note for note in result["notes"])
    result = compared(capsys, old, older)
    assert any(note.startswith("Bytes are those that ids decode to") for note in result["notes"])
    assert any(note.startswith("older has no bits per byte") for note in result["notes"])


def test_a_curve_has_bits_per_byte_of_one_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that an older version began and this one continued."""
    run = write_run(tmp_path / "run", {2: 5.0}, steps=2, values={"bits_per_byte": 2.0})
    newer = evaluation(4, 4.0, HELD_OUT | {"bytes_of": "documents"}, {"bits_per_byte": 1.0})
    write_lines(run, [*map(orjson.loads, (run / "metrics.jsonl").read_bytes().splitlines()), newer])
    curve = compared(capsys, run)["groups"]["run"]["runs"][0]["curve"]
    assert [point["values"].get("bits_per_byte") for point in curve] == [None, 1.0]
    assert [point["values"]["lm_loss"] for point in curve] == [5.0, 4.0]


def test_an_evaluation_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_run(tmp_path / "plain", {4: 4.0})
    (tmp_path / "whole").mkdir()
    whole = evaluation(0, 4.25, {**HELD_OUT, "num_tokens": 5000}, {"agreement": 0.5})
    fingerprint = write_checkpoint(plain, 4)
    write_lines(tmp_path / "whole", [{**whole, "checkpoint": fingerprint}])
    result = compared(capsys, f"{plain}+{tmp_path / 'whole'}")
    assert figures(result, "plain")["lm_loss"] == 4.25 and result["target"] == 4.0
    write_lines(tmp_path / "whole", [{**whole, "checkpoint": "0" * 32}])
    assert run_compare(f"{plain}+{tmp_path / 'whole'}") == ExitStatus.MISMATCH
    assert f"which is none of {plain}" in capsys.readouterr().err


def test_what_cannot_be_said_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_run(tmp_path / "plain", {4: 4.0}, held_out=None)
    running = write_run(tmp_path / "running", {2: 4.5}, steps=3, train_iters=9, seed=2)
    silent = write_run(tmp_path / "silent", {}, config={"student": {"num_layers": 5}})
    (silent / "config.yaml").unlink()
    notes = "\n".join(compared(capsys, plain, running, silent)["notes"])
    assert "is at step 3 of 9" in notes and "silent has no evaluations" in notes
    assert "an older record, which does not say what was held out" in notes
    assert "different numbers of tokens: 300, 400" in notes
    for words, said in (
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "no metrics.jsonl there"),
        ([plain, "--baseline", "x"], "expected one of plain"),
        ([plain, "--plot", "x.bmp"], ".png"),
        ([plain, "--target-loss", "-1"], "expected a positive number"),
        ([f"={plain}"], "expected [NAME=]FOLDER"),
        ([f"{plain}+{silent}"], "no evaluation there"),
    ):
        assert run_compare(*words) == ExitStatus.USAGE
        assert said in capsys.readouterr().err


def test_captures_and_scorings_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [tmp_path / "teacher", tmp_path / "reference"]
    fingerprints = [write_checkpoint(folder, 4, num_layers=number) for number, folder in enumerate(models, 1)]
    for folder, model in zip(("t", "r"), fingerprints):  # the teacher's in the pass that captures
        write_scores(tmp_path / folder, [-1.0] * 10, [1] * 10, dataset="d", model=model)
    (tmp_path / "store").mkdir()
    write_manifest(
        tmp_path / "store" / STORE,
        format=FORMAT,
        version=VERSION,
        parameters={"packing": "concat", "seq_length": 7, "samples_with_targets": 10},
        parents={"dataset": "d", "model": fingerprints[0]},
        tokenizer=None,
        files=[],
    )
    known = Known()
    known.add_scores([tmp_path / "t", tmp_path / "r"])
    with SelectionWriter(tmp_path / "half") as writer:
        writer.append(np.array([0, 1]))
        parents = {f"scores {number}": fingerprint for number, fingerprint in enumerate(known.scores)}
        writer.finish(packing="concat", seq_length=7, num_samples=10, dataset="d", rule={}, parents=parents)
    config = {
        "data": {"selection": [str(tmp_path / "half")]},
        "teacher": {"logits_load_dir": [str(tmp_path / "store")]},
    }
    refined = write_run(tmp_path / "refined", {4: 4.0}, config=config)
    flags = ["--models", *models, "--scores", tmp_path / "t", tmp_path / "r"]
    result = compared(capsys, refined, *flags)
    shapes = [read_record(folder).shape for folder in models]
    passes = sum(70 * shape.flops_forward(seq_length=7, vocab_size=8) for shape in shapes)  # 10 samples of 7 tokens
    assert figures(result, "refined")["all_flops"] == pytest.approx(2400 + passes) and result["notes"] == []
    notes = "\n".join(compared(capsys, refined)["notes"])
    assert "(--models DIR)" in notes and "(--scores DIR)" in notes
    assert run_compare(refined) == ExitStatus.COMPLETE and "| ≥ 2.4e+03 |" in capsys.readouterr().out
    notes = "\n".join(compared(capsys, refined, *flags[3:])["notes"])
    assert f"its model {fingerprints[1][:8]} is not among the folders given (--models DIR)" in notes


def test_records_are_read_as_runs_leave_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {2: 5.0, 4: 4.0})
    path = folder / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"step":5,"tok')
    assert [step.step for step in read_run(folder, flag="").steps] == [1, 2, 3, 4]
    # it went on from step 2 in a file that was not cut back: what came after that is void, the evaluation at 4 too
    again = b'{"step":3,"tokens":300,"lm_loss":1.0,"seconds":0.5}\n'
    path.write_bytes(before + again)
    record = read_run(folder, flag="")
    assert [step.lm_loss for step in record.steps] == [5.0, 5.0, 1.0]
    assert [each.step for each in record.evaluations] == [2]
    path.write_bytes(before + b"{\n" + again)
    assert run_compare(folder) == ExitStatus.CORRUPT
    path.write_bytes(b"")
    assert read_run(folder, flag="").steps == ()
    assert run_compare(folder) == ExitStatus.COMPLETE


def test_where_a_loss_is_reached() -> None:
    assert reached([1, 2, 4], [5.0, 4.0, 3.0], 3.5) == 3
    assert reached([1, 2, 4], [5.0, 4.0, 3.0], 5.0) == reached([1, 2], [4.0, 3.0], 9.0) == 1
    assert reached([1, 2], [4.0, 3.0], 2.9) is None and reached([], [], 1.0) is None
    assert reached([1, 2, 3, 4], [5.0, 4.0, 4.5, 3.0], 4.0) == 2  # the first time counts

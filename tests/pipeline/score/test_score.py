"""Scores: equal to the whole logits in float64, the same bits for any number of ranks, and nothing foreign mixed in."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import slow
from pipeline.score.score_runs import make_config, run_score, run_some
from runs import TOKENIZER, VOCAB, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.indexed.writer import IndexedWriter
from megakd.data.samples.concat import ConcatSamples
from megakd.data.scores.artefact import DTYPES, Scores, write_scores
from megakd.errors import MismatchError, UsageError
from megakd.pipeline.score.preflight import check_score

SEQ = 16
SAMPLES = 118  # of 1900 tokens: no multiple of the ranges' 13, nor these of the microbatches' 4


def build_twin(load: str) -> Any:
    """The model in float64, its head with it."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.checkpoint.record import read_record
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    record = read_record(load)
    groups = init_parallel(ParallelConfig(), seed=1)
    (model,) = build_model(record.shape, groups, vocab_size=VOCAB, seq_length=SEQ)
    load_weights(record, [model], groups)
    return model.eval().double()


def read_row(model: Any, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and entropy of every label of one sample, from whole logits."""
    tokens = torch.from_numpy(row.astype(np.int64))
    with torch.no_grad():
        hidden = model(tokens[None, :-1], None, None)[:, 0]
        log_p = (hidden @ model.output_weight().t())[:, :VOCAB].log_softmax(-1)
    return log_p.gather(1, tokens[1:, None])[:, 0].numpy(), -(log_p.exp() * log_p).sum(-1).numpy()


def twin(load: str, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Of every sample, ``[num_samples, seq_length]``."""
    model, tokens = build_twin(load), IndexedDataset(data).tokens
    rows = [read_row(model, tokens[start : start + SEQ + 1]) for start in range(0, len(tokens) - SEQ, SEQ)]
    return np.stack([log_probs for log_probs, _ in rows]), np.stack([entropies for _, entropies in rows])


def twin_of_reset(load: str, data: str) -> np.ndarray:
    """``[num_samples, seq_length]``, NaN where another document starts: every document of a sample with a mask of its
    own and positions that begin anew, one label after the other."""
    model, dataset = build_twin(load), IndexedDataset(data)
    tokens, starts = dataset.tokens, {dataset.document_start(document) for document in range(dataset.num_documents)}
    assert dataset.manifest is not None
    texts = "append_eod" in dataset.manifest.parameters  # each document is one, an id inside of it a literal
    found = []
    for start in range(0, len(tokens) - SEQ, SEQ):
        row, values, first = tokens[start : start + SEQ + 1], np.full(SEQ, np.nan), 0
        for place in range(SEQ):
            behind_id, at_start = row[place] == TOKENIZER["eod"], start + place + 1 in starts
            if at_start or (behind_id and not texts):
                first = place + 1
            if not (behind_id or at_start):
                values[place] = read_row(model, row[first : place + 2])[0][-1]
        found.append(values)
    return np.stack(found)


def twin_of_documents(load: str, data: str) -> np.ndarray:
    """The sum of log-probabilities of every document."""
    model, dataset = build_twin(load), IndexedDataset(data)
    return np.array([read_row(model, row)[0].sum() if len(row) > 1 else 0.0 for row in dataset])


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two models, two datasets, and what the twin says."""
    folder = tmp_path_factory.mktemp("score")
    made: dict[str, Any] = {"folder": folder}
    made["data"] = write_dataset(folder / "data", num_tokens=1900)
    made["other"] = write_dataset(folder / "other", num_tokens=1900, seed=1)
    made["foreign"] = write_dataset(folder / "foreign", num_tokens=1900, tokenizer={**TOKENIZER, "hash": "1" * 32})
    for name, tied in (("model", True), ("second", False)):
        tree = make_tree(made["data"], training={"train_iters": 3}, checkpoint={"save": str(folder / name)})
        tree["student"]["untie_embeddings_and_output_weights"] = tied
        assert world(1).run(run_training, tree) == [0]
        made[name] = str(folder / name)
        ((made[f"{name} log_probs"], made[f"{name} entropies"]),) = world(1).run(twin, made[name], made["data"])
    everything = {"per_token_log_probs": True, "per_token_entropy": True}
    assert world(1).run(run_score, make_score_tree(made, folder / "everything", **everything)) == [0]
    assert world(1).run(run_score, make_score_tree(made, folder / "whole")) == [0]
    assert world(1).run(run_some, make_score_tree(made, folder / "unfinished"), 4) == [4 * 13]
    return made


def write_tokens(prefix: Path, tokens: np.ndarray, lengths: Any, parameters: Any = None) -> str:
    writer = IndexedWriter(prefix, np.uint16)
    writer.add_documents(tokens.astype(np.uint16), np.asarray(lengths, np.int32))
    writer.finish(parameters=parameters or {}, parents={}, tokenizer=TOKENIZER)
    return str(prefix)


def make_score_tree(made: dict[str, Any], output: Path, **more: Any) -> dict[str, Any]:
    tree = {"load": made["model"], "data_path": made["data"], "seq_length": SEQ, "output": str(output)}
    return tree | {"micro_batch_size": 4, "range_samples": 13, "log_interval": 0.0} | more


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model", ["model", "second"])
def test_scores_equal_whole_logits_in_float64(model: str, made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    folder = made["folder"] / "everything"
    if model == "second":  # its output weight is its own
        folder = tmp_path / "s"
        more = {"load": made[model], "per_token_log_probs": True, "per_token_entropy": True}
        assert world(1).run(run_score, make_score_tree(made, folder, **more)) == [0]
    expected = made[f"{model} log_probs"]
    scores = Scores(folder, expect_dataset=IndexedDataset(made["data"]).fingerprint)
    assert scores.num_samples == SAMPLES == len(expected)
    assert np.abs(scores.log_probs / expected.sum(1) - 1).max() < 1e-5
    assert (scores.counts == SEQ).all() and scores.counts.dtype == np.int32
    assert scores.token_log_probs is not None and scores.token_entropies is not None
    np.testing.assert_allclose(scores.token_log_probs, expected, rtol=1e-3)
    np.testing.assert_allclose(scores.token_entropies, made[f"{model} entropies"], rtol=1e-3)
    assert sorted(files(folder)) == sorted([*DTYPES, "scores.json"])
    parameters = scores.manifest.parameters
    assert (parameters["packing"], parameters["seq_length"], parameters["mask_policy"]) == ("concat", SEQ, "all")
    assert parameters["precision"] == "fp32" and set(scores.manifest.parents) == {"dataset", "model"}


def test_what_follows_an_end_of_document_is_left_out(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    more = {"mask_policy": "skip_after_eod", "per_token_log_probs": True}
    assert world(1).run(run_score, make_score_tree(made, tmp_path / "s", **more)) == [0]
    inputs = ConcatSamples(IndexedDataset(made["data"]), SEQ).read(np.arange(SAMPLES))[:, :-1]
    behind_id = inputs == TOKENIZER["eod"]
    first = (np.arange(1, 1 + SAMPLES * SEQ) % 50 == 0).reshape(SAMPLES, SEQ)  # of a document, whatever it is behind
    scored = ~(behind_id | first)
    assert (behind_id & ~first).any() and (first & ~behind_id).any()
    scores = Scores(tmp_path / "s")
    assert (scores.counts == scored.sum(1)).all()
    expected = np.where(scored, made["model log_probs"], 0).sum(1)
    assert np.abs(scores.log_probs / expected - 1).max() < 1e-5
    assert scores.token_log_probs is not None
    assert (np.isnan(scores.token_log_probs) == ~scored).all()


@pytest.mark.slow
@pytest.mark.parametrize("told_by", [pytest.param("ids", marks=pytest.mark.long), "index"])
def test_documents_by_themselves(told_by: str, made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, VOCAB - 1, 1000), rng.integers(1, 12, 150)
    lengths = lengths[np.cumsum(lengths) < 1000]  # documents of 1 to 11 tokens, some over an edge
    if told_by == "ids":
        tokens[np.cumsum(lengths)] = TOKENIZER["eod"]
        lengths = np.array([1000])
    else:
        lengths[-1] += 1000 - lengths.sum()
        tokens[::41] = TOKENIZER["eod"]  # literals in the texts
    by_ids = told_by == "ids"
    data = write_tokens(tmp_path / "data", tokens, lengths, None if by_ids else {"append_eod": False})
    (expected,) = world(1).run(twin_of_reset, made["model"], data)
    ((with_context, _),) = world(1).run(twin, made["model"], data)
    more = {"mask_policy": "reset", "per_token_log_probs": True, "per_token_entropy": True, "data_path": data}
    assert world(1).run(run_score, make_score_tree(made, tmp_path / "one", **more)) == [0]
    scores = Scores(tmp_path / "one")
    scored = ~np.isnan(expected)
    assert (scores.counts == scored.sum(1)).all()
    assert np.abs(scores.log_probs / np.nansum(expected, axis=1) - 1).max() < 1e-5
    changed = np.abs(np.nansum(expected, axis=1) / np.where(scored, with_context, 0).sum(1) - 1)
    assert changed.max() > 1e-3, "what stands before a document does not matter here: the test cannot fail"
    np.testing.assert_allclose(scores.token_log_probs, expected, rtol=1e-3)
    assert (np.isnan(np.asarray(scores.token_entropies)) == ~scored).all()
    assert set(world(2).run(run_score, make_score_tree(made, tmp_path / "two", **more))) == {0}
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert scores.manifest.parameters["boundaries"] == ("index and end-of-document ids" if by_ids else "index")
    if not by_ids:
        return
    more |= {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert set(world(4).run(run_score, make_score_tree(made, tmp_path / "split", **more))) == {0}
    split = Scores(tmp_path / "split")
    assert (split.counts == scores.counts).all()
    assert np.abs(split.log_probs / np.nansum(expected, axis=1) - 1).max() < 1e-5


@pytest.mark.parametrize(("size", "threads"), [(2, 1), slow(4, 1), slow(1, 2)])
def test_the_number_of_ranks_changes_no_bit(
    size: int, threads: int, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    more = {"per_token_log_probs": True, "per_token_entropy": True}
    tree = make_score_tree(made, tmp_path / "many", **more)
    assert set(world(size).run(run_score, tree, threads)) == {0}
    assert files(tmp_path / "many") == files(made["folder"] / "everything")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout", "model"),
    [
        (2, {"tensor_model_parallel_size": 2}, "model"),
        (2, {"tensor_model_parallel_size": 2}, "second"),
        (2, {"pipeline_model_parallel_size": 2}, "model"),
        (2, {"pipeline_model_parallel_size": 2}, "second"),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "model"),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "model"),
        (4, {"pipeline_model_parallel_size": 2}, "second"),
    ],
)
def test_layouts_agree(
    size: int, layout: dict[str, Any], model: str, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    tree = make_score_tree(made, tmp_path / "s", load=made[model], per_token_log_probs=True, **layout)
    assert set(world(size).run(run_score, tree)) == {0}
    scores = Scores(tmp_path / "s")
    assert np.abs(scores.log_probs / made[f"{model} log_probs"].sum(1) - 1).max() < 1e-5
    assert scores.token_log_probs is not None
    np.testing.assert_allclose(scores.token_log_probs, made[f"{model} log_probs"], rtol=1e-3)


@pytest.mark.slow
def test_a_range_smaller_than_a_microbatch(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    tree = make_score_tree(made, tmp_path / "s", range_samples=3, pipeline_model_parallel_size=2)
    assert set(world(2).run(run_score, tree)) == {0}
    assert np.abs(Scores(tmp_path / "s").log_probs / made["model log_probs"].sum(1) - 1).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_samples_of_different_lengths(size: int, made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 202, 50).astype(np.int32)
    lengths[7] = 1
    write_tokens(tmp_path / "documents", rng.integers(0, VOCAB, lengths.sum()), lengths)
    more = {"data_path": str(tmp_path / "documents"), "packing": "document", "seq_length": 200}
    more |= {"per_token_log_probs": True, "pipeline_model_parallel_size": size}
    assert set(world(size).run(run_score, make_score_tree(made, tmp_path / "s", **more))) == {0}
    scores = Scores(tmp_path / "s")
    assert (scores.counts == lengths - 1).all() and scores.manifest.parameters["packing"] == "document"
    (expected,) = world(1).run(twin_of_documents, made["model"], str(tmp_path / "documents"))
    assert scores.log_probs[7] == 0
    several = lengths > 1
    assert np.abs(scores.log_probs[several] / expected[several] - 1).max() < 1e-5
    assert scores.token_log_probs is not None
    assert (np.isfinite(scores.token_log_probs).sum(1) == lengths - 1).all()
    assert np.abs(np.nansum(scores.token_log_probs.astype(float), 1) - expected).max() < 1


@pytest.mark.slow
def test_bf16_is_another_precision(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    assert world(1).run(run_score, make_score_tree(made, tmp_path / "s", bf16=True)) == [0]
    scores = Scores(tmp_path / "s")
    assert scores.manifest.parameters["precision"] == "bf16"
    error = np.abs(scores.log_probs / made["model log_probs"].sum(1) - 1).max()
    assert 1e-7 < error < 1e-2


FOREIGN: dict[str, dict[str, Any]] = {
    "dataset": {"data_path": "other"},
    "model": {"load": "second"},
    "seq_length": {"seq_length": 8},
    "mask_policy": {"mask_policy": "reset"},
    "precision": {"bf16": True},
    "range_samples": {"range_samples": 14},
    "columns": {"per_token_entropy": True},
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("whole", [False, True])
def test_other_scores_in_the_folder_are_refused(what: str, whole: bool, made: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / ("whole" if whole else "unfinished"), folder)
    more: dict[str, Any] = FOREIGN.get(
        what, {"range_samples": 14} if what == "range_samples" else {"per_token_entropy": True}
    )
    tree = make_score_tree(made, folder, **{key: made.get(str(value), value) for key, value in more.items()})
    if whole and what == "range_samples":
        check_score(make_config(tree), 1)  # finished scores are finished, however they were cut
        return
    expected: type[ValueError] = UsageError if whole and what == "columns" else MismatchError
    with pytest.raises(expected, match=what if not (whole and what == "columns") else "finished without") as caught:
        check_score(make_config(tree), 1)
    if what == "dataset":
        assert IndexedDataset(made["data"]).fingerprint in str(caught.value)
        assert IndexedDataset(made["other"]).fingerprint in str(caught.value)


def test_parts_of_another_run_are_refused_even_if_they_come_later(made: dict[str, Any], tmp_path: Path) -> None:
    plan = check_score(make_config(make_score_tree(made, tmp_path / "s", load=made["second"])), 1)
    shutil.copytree(made["folder"] / "unfinished", tmp_path / "s")
    with pytest.raises(MismatchError, match="model: .* there"):
        plan.parts.claim()


def test_foreign_scores_are_refused_by_the_reader(made: dict[str, Any], tmp_path: Path) -> None:
    values = np.zeros(3, np.float32), np.ones(3, np.int32)
    parents = {"dataset": "1" * 32, "model": "2" * 32}
    write_scores(tmp_path, *values, parameters={"seq_length": 4}, parents=parents, tokenizer=None)
    assert (Scores(tmp_path).counts == 1).all() and Scores(tmp_path).token_entropies is None
    with pytest.raises(MismatchError, match=f"dataset {'1' * 32}.*{'3' * 32}"):
        Scores(tmp_path, expect_dataset="3" * 32)


@pytest.mark.slow
def test_damaged_ranges_are_dropped_and_made_again(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / "unfinished", folder)
    part = folder / "parts" / "00000002.part"
    part.write_bytes(b"\x01" * part.stat().st_size)
    (folder / "parts" / "00000001.part").write_bytes(b"")  # not even whole: done again without a word
    with pytest.raises(Exception, match="1 of 10 ranges are not what was written, the first is 00000002.part"):
        world(1).run(run_score, make_score_tree(made, folder))
    assert world(1).run(run_score, make_score_tree(made, folder)) == [0]
    assert files(folder) == files(made["folder"] / "whole")


def run_while_another_joins(tree: dict[str, Any]) -> tuple[int, str]:
    """A run that finds the parts joined when it comes to that; status, and what it says."""
    from megakd.pipeline.score.parts import Parts

    claim_finish, told = Parts.claim_finish, io.StringIO()

    def late(self: Parts) -> None:
        lock = claim_finish(self)
        assert lock is not None
        self.finish(lock)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(told):
        patch.setattr(Parts, "claim_finish", late)
        return run_score(tree), told.getvalue()


@pytest.mark.slow
def test_a_job_that_another_one_finishes_says_so(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "unfinished", tmp_path / "s")
    ((status, told),) = world(1).run(run_while_another_joins, make_score_tree(made, tmp_path / "s"))
    assert status == 0 and told.count(f"{tmp_path}/s: finished; another process had the last of it\n") == 1
    assert files(tmp_path / "s") == files(made["folder"] / "whole")


@pytest.mark.slow
def test_files_that_are_not_ours_stay(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / "unfinished", folder)
    for name in ("mine.json", "001.json", "00000001"):
        (folder / "parts" / name).write_text("precious")
    for _ in range(2):
        assert world(1).run(run_score, make_score_tree(made, folder)) == [0]
        left = {path.name: path.read_text() for path in (folder / "parts").iterdir()}
        assert left == dict.fromkeys(("mine.json", "001.json", "00000001"), "precious")


def test_the_output_is_a_folder(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(UsageError, match="--output .*/s: a file is there"):
        check_score(make_config(make_score_tree(made, tmp_path / "s")), 1)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"load": "/nowhere"}, UsageError, "--load: folder /nowhere does not exist"),
        ({"data_path": "/nowhere/data"}, UsageError, "/nowhere/data"),
        ({"data_path": "foreign"}, MismatchError, "1{32}.*0{32}"),
        ({"seq_length": 4000}, UsageError, "do not make one sample of seq_length 4000"),
        ({"micro_batch_size": 0}, UsageError, "--micro-batch-size is 0"),
        ({"range_samples": -1}, UsageError, "--range-samples is -1"),
        ({"tensor_model_parallel_size": 2}, UsageError, "world size 1 is not a multiple of TP x PP x CP = 2"),
        ({"sequence_parallel": True}, UsageError, "--sequence-parallel needs --tensor-model-parallel-size > 1"),
    ],
)
def test_refusals(
    tree: dict[str, Any], error: type[ValueError], message: str, made: dict[str, Any], tmp_path: Path
) -> None:
    more = {key: made.get(str(value), value) for key, value in tree.items()}
    with pytest.raises(error, match=message):
        check_score(make_config(make_score_tree(made, tmp_path / "s", **more)), 1)
    assert not (tmp_path / "s").exists()

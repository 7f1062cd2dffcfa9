"""Logits stores: what the teacher's whole logits in float64 say, the same bytes for any number of ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draws import draw
from pipeline.frozen.frozen_runs import make_some
from runs import TOKENIZER, VOCAB, make_tree, run_training, write_dataset
from worlds import Worlds

from megakd.config.tree import from_dict, validate
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.data.scores.artefact import Scores
from megakd.data.selection import SelectionWriter
from megakd.errors import CorruptError, MismatchError, UsageError
from megakd.logits.sparsify import uniform_numbers
from megakd.logits.store import LogitsStore, verify_store
from megakd.pipeline.capture.preflight import CaptureConfig, check_capture
from megakd.pipeline.datasets.show import main as show
from megakd.pipeline.datasets.verify import main as verify
from megakd.pipeline.select.main import main as select

SEQ = 16
SAMPLES = 118  # of 1900 tokens: no multiple of the shards' 13


def make_config(tree: dict[str, Any]) -> CaptureConfig:
    config = from_dict(CaptureConfig, tree)
    validate(config)
    return config


def run_capture(tree: dict[str, Any], only: int | None = None) -> int:
    """A whole run in a world, or so many shards of it as a run that was killed leaves them."""
    from megakd.parallel import init_parallel
    from megakd.pipeline.capture.run import build_capturer, capture

    config = make_config(tree)
    plan = check_capture(config, int(os.environ["WORLD_SIZE"]))
    if only is None:
        return int(capture(config, plan))
    make_some(plan.work, build_capturer(config, plan, init_parallel(config.parallel(), seed=0)), only)
    return 0


def twin(load: str, data: str) -> np.ndarray:
    """log p of every id at every position, ``[num_samples, seq_length, V]`` float64, from whole logits."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.load import load_weights
    from megakd.model.checkpoint.record import read_record
    from megakd.model.gpt import build_model
    from megakd.parallel import init_parallel

    record, tokens = read_record(load), IndexedDataset(data).tokens
    groups = init_parallel(ParallelConfig(), seed=1)
    (model,) = build_model(record.shape, groups, vocab_size=VOCAB, seq_length=SEQ)
    load_weights(record, [model], groups)
    model = model.eval().double()
    found = []
    with torch.no_grad():
        for start in range(0, len(tokens) - SEQ, SEQ):
            inputs = torch.from_numpy(tokens[start : start + SEQ].astype(np.int64))
            hidden = model(inputs[None], None, None)[:, 0]
            found.append((hidden @ model.output_weight().t())[:, :VOCAB].log_softmax(-1).numpy())
    return np.stack(found)


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher, a dataset, what the twin says, and a store of each kind."""
    folder = tmp_path_factory.mktemp("capture")
    made: dict[str, Any] = {"folder": folder, "data": write_dataset(folder / "data", num_tokens=1900)}
    made["other"] = write_dataset(folder / "other", num_tokens=1900, seed=1)
    made["foreign"] = write_dataset(folder / "foreign", num_tokens=1900, tokenizer={**TOKENIZER, "hash": "1" * 32})
    tree = make_tree(made["data"], training={"train_iters": 60}, checkpoint={"save": str(folder / "teacher")})
    assert world(1).run(run_training, tree) == [0]
    made["teacher"] = str(folder / "teacher")
    (made["log_probs"],) = world(1).run(twin, made["teacher"], made["data"])
    for kind in KINDS:
        assert world(1).run(run_capture, capture_tree(made, folder / kind, kind)) == [0]
    return made


KINDS: dict[str, dict[str, Any]] = {
    "top_p_k": {"top_k": 20, "top_p": 0.15, "value_bits": "16"},
    "samples": {"draws": 50},
    "renormalised_samples": {"draws": 30, "value_bits": "32"},
    "weighted": {"kind": "samples", "draws": 40, "proposal_exponent": 0.7, "value_bits": "32"},
}


def capture_tree(made: dict[str, Any], output: Path, kind: str, **more: Any) -> dict[str, Any]:
    base = {"load": made["teacher"], "data_path": made["data"], "seq_length": SEQ, "output": str(output), "kind": kind}
    base |= {"shard_samples": 13, "micro_batch_size": 4, "bf16": False}
    return {**base, **KINDS[kind], **more}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(made: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probabilities and entropies of all samples, in arrays."""
    store = LogitsStore(folder)
    inputs = ConcatSamples(IndexedDataset(made["data"]), SEQ).read(np.arange(SAMPLES))[:, :-1]
    rows = store.read_batch(np.arange(SAMPLES), inputs)
    assert rows.has_targets_BS.all()
    return rows.ids_BSK, rows.log_probs_BSK, rows.entropy_BS


def entropy(log_probs: np.ndarray) -> np.ndarray:
    return -(np.exp(log_probs) * log_probs).sum(-1)


def test_the_best_ids_up_to_their_mass(made: dict[str, Any]) -> None:
    ids, log_probs, entropies = rows_of(made, made["folder"] / "top_p_k")
    expected = made["log_probs"]
    order = np.argsort(-expected, axis=-1, kind="stable")[..., :20]
    best = np.take_along_axis(expected, order, -1)
    kept = np.cumsum(np.exp(best), -1) - np.exp(best) < 0.15
    assert 1 < kept.sum(-1).min() < kept.sum(-1).max() <= 20
    assert (np.isfinite(log_probs).sum(-1) == kept.sum(-1)).all()
    for place in np.ndindex(ids.shape[:2]):
        own = np.isfinite(log_probs[place])
        assert set(ids[place][own].tolist()) == set(order[place][kept[place]].tolist())
        assert np.abs(log_probs[place][own] - expected[place][ids[place][own]]).max() < 2e-3
    assert np.abs(entropies - entropy(expected)).max() < 1e-3


def test_counts_of_draws_at_the_numbers_of_their_positions(made: dict[str, Any]) -> None:
    ids, log_probs, entropies = rows_of(made, made["folder"] / "samples")
    counts = np.rint(np.exp(log_probs.astype(np.float64)) * 50).astype(int)
    assert (counts.sum(-1) == 50).all()
    numbers = uniform_numbers(np.arange(SAMPLES * SEQ), 50, seed=1234, dataset=IndexedDataset(made["data"]).fingerprint)
    probs = np.exp(made["log_probs"]).reshape(-1, VOCAB)
    wrong = 0
    for row, (own_ids, own_counts) in enumerate(zip(ids.reshape(-1, ids.shape[-1]), counts.reshape(len(numbers), -1))):
        drawn = draw(probs[row], numbers[row])
        expected = np.bincount(drawn, minlength=VOCAB)
        found = np.zeros(VOCAB, int)
        found[own_ids[own_counts > 0]] = own_counts[own_counts > 0]
        wrong += bool((found != expected).any())
    assert wrong <= len(numbers) // 1000
    assert np.abs(entropies - entropy(made["log_probs"])).max() < 1e-3


def test_draws_of_a_flatter_teacher_are_weighted(made: dict[str, Any]) -> None:
    ids, log_probs, _ = rows_of(made, made["folder"] / "weighted")
    numbers = uniform_numbers(np.arange(SAMPLES * SEQ), 40, seed=1234, dataset=IndexedDataset(made["data"]).fingerprint)
    proposal = np.exp(0.7 * made["log_probs"].reshape(-1, VOCAB))
    proposal /= proposal.sum(-1, keepdims=True)
    weights = np.exp(made["log_probs"].reshape(-1, VOCAB)) / proposal
    wrong = 0
    for row, (own_ids, own) in enumerate(zip(ids.reshape(-1, ids.shape[-1]), log_probs.reshape(len(numbers), -1))):
        drawn = draw(proposal[row], numbers[row])
        expected = np.bincount(drawn, minlength=VOCAB) / 40 * weights[row]
        found = np.zeros(VOCAB)
        found[own_ids[own > -np.inf]] = np.exp(own[own > -np.inf].astype(np.float64))
        wrong += not np.allclose(found, expected, rtol=1e-4, atol=0)
    assert wrong <= len(numbers) // 1000
    # unbiased: the mean over all positions is the teacher's
    mean, spread = np.zeros(VOCAB), np.zeros(VOCAB)
    np.add.at(mean, ids.ravel(), np.exp(log_probs.astype(np.float64)).ravel() / len(numbers))
    spread = np.sqrt((np.exp(made["log_probs"].reshape(-1, VOCAB)) * weights).sum(0) / 40) / len(numbers)
    assert (np.abs(mean - np.exp(made["log_probs"]).mean((0, 1))) < 5 * spread).all()


def test_drawn_ids_renormalised(made: dict[str, Any]) -> None:
    ids, log_probs, _ = rows_of(made, made["folder"] / "renormalised_samples")
    assert np.abs(np.exp(log_probs.astype(np.float64)).sum(-1) - 1).max() < 1e-5
    expected = np.take_along_axis(made["log_probs"], ids, -1)
    shift = np.where(np.isfinite(log_probs), log_probs - expected, np.nan)
    assert np.nanmax(np.nanmax(shift, -1) - np.nanmin(shift, -1)) < 1e-4, "ratios of the teacher's probabilities"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_the_number_of_ranks_changes_no_byte(
    kind: str, size: int, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    assert set(world(size).run(run_capture, capture_tree(made, tmp_path / "many", kind))) == {0}
    assert files(tmp_path / "many") == files(made["folder"] / kind)


@pytest.mark.slow
def test_a_run_goes_on_where_another_ended(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    tree = capture_tree(made, tmp_path / "s", "top_p_k")
    assert world(1).run(run_capture, tree, 4) == [0]
    assert len(list((tmp_path / "s" / "shards").glob("*.json"))) == 4
    with pytest.raises(UsageError):
        LogitsStore(tmp_path / "s")
    shard = tmp_path / "s" / "shards" / "00000002.rows"
    shard.write_bytes(shard.read_bytes()[:-5])  # as a machine that went down may leave it
    assert set(world(2).run(run_capture, tree)) == {0}
    assert files(tmp_path / "s") == files(made["folder"] / "top_p_k")
    assert world(1).run(run_capture, tree) == [0]  # finished already


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_another_layout_differs_by_a_quantisation_step(
    kind: str, made: dict[str, Any], world: Worlds, tmp_path: Path
) -> None:
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert set(world(4).run(run_capture, capture_tree(made, tmp_path / "split", kind, **layout))) == {0}
    one, other = (rows_of(made, folder) for folder in (made["folder"] / kind, tmp_path / "split"))
    dense = [np.full((SAMPLES, SEQ, VOCAB), -np.inf) for _ in range(2)]
    for array, (ids, log_probs, _) in zip(dense, (one, other)):
        filled = np.isfinite(log_probs)
        place = np.nonzero(filled)
        array[place[0], place[1], ids[filled]] = log_probs[filled]
    listed = [np.isfinite(array) for array in dense]
    moved = (listed[0] != listed[1]).any(-1)
    if kind == "top_p_k":  # only where probabilities tie, or a prefix just reaches its mass
        assert moved.mean() < 1e-2
        same = listed[0] & listed[1]
        assert np.abs(dense[0][same] - dense[1][same]).max() < 4e-3
    else:
        assert moved.mean() <= 1e-3
        same = (~moved)[..., None] & listed[0]
        assert np.abs(dense[0][same] - dense[1][same]).max() < 1e-4
    assert np.abs(one[2] - other[2]).max() < 2e-3


def test_a_selection_alone(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    ids = np.array([*range(3, 30, 2), 100], np.int64)
    with_ids = SelectionWriter(tmp_path / "selection")
    with_ids.append(ids)
    dataset = IndexedDataset(made["data"]).fingerprint
    with_ids.finish(packing="concat", seq_length=SEQ, num_samples=SAMPLES, dataset=dataset, rule={})
    tree = capture_tree(made, tmp_path / "s", "top_p_k", selection=str(tmp_path / "selection"))
    assert world(1).run(run_capture, tree) == [0]
    part, whole = LogitsStore(tmp_path / "s"), LogitsStore(made["folder"] / "top_p_k")
    assert [sample for sample in range(SAMPLES) if part.has_targets(sample)] == ids.tolist()
    inputs = ConcatSamples(IndexedDataset(made["data"]), SEQ).read(ids)[:, :-1]
    for sample, row in zip(ids.tolist(), inputs):
        own, expected = part.read(sample, row), whole.read(sample, row)
        assert own is not None and expected is not None
        np.testing.assert_array_equal(own.ids_TK, expected.ids_TK)


def test_scores_in_the_same_pass(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    more = {"scores_output": str(tmp_path / "scores")}
    assert set(world(2).run(run_capture, capture_tree(made, tmp_path / "s", "samples", **more))) == {0}
    assert files(tmp_path / "s") == files(made["folder"] / "samples")
    rows = ConcatSamples(IndexedDataset(made["data"]), SEQ).read(np.arange(SAMPLES))
    expected = np.take_along_axis(made["log_probs"], rows[:, 1:, None], -1)[..., 0].sum(1)
    scores = Scores(tmp_path / "scores")
    assert (scores.counts == SEQ).all() and np.abs(scores.log_probs / expected - 1).max() < 1e-5
    assert not list((tmp_path / "scores").glob("parts")) and not list((tmp_path / "s").rglob("*.lock"))


def test_documents_have_a_row_for_each_label(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    more = {"packing": "document", "seq_length": 64}
    assert world(1).run(run_capture, capture_tree(made, tmp_path / "s", "top_p_k", **more)) == [0]
    store, dataset = LogitsStore(tmp_path / "s"), IndexedDataset(made["data"])
    for sample in (0, 5, 37):
        rows = store.read(sample, np.asarray(dataset[sample])[:-1])
        assert rows is not None and rows.num_rows == len(dataset[sample]) - 1


UNUSED = {"top_k": None, "top_p": None, "value_bits": None}
FOREIGN: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "dataset": ({"data_path": "other"}, MismatchError),
    "tokenizer": ({"data_path": "foreign"}, MismatchError),
    "seq_length": ({"seq_length": 8}, MismatchError),
    "kind": ({"kind": "samples", **UNUSED}, MismatchError),
    "unused": ({"kind": "samples"}, UsageError),
    "top_k": ({"top_k": 21}, MismatchError),
    "value_bits": ({"value_bits": "8"}, MismatchError),
    "shard_samples": ({"shard_samples": 14}, MismatchError),
    "bf16": ({"bf16": True}, MismatchError),
    "vocabulary": ({"top_k": VOCAB + 1}, UsageError),
    "draws": ({"draws": 5}, UsageError),
    "proposal": ({"proposal_exponent": 0.9}, UsageError),
    "flat": ({**KINDS["samples"], "kind": "samples", **UNUSED, "proposal_exponent": 0.1}, UsageError),
    "top_p": ({"top_p": 0.0}, UsageError),
    "scores": ({"scores_output": "output"}, UsageError),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", FOREIGN)
def test_refusals(what: str, whole: bool, made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "top_p_k", tmp_path / "s")
    if not whole:
        (tmp_path / "s" / "store.json").unlink()
    change, error = FOREIGN[what]
    places = {"data_path": made, "scores_output": {"output": str(tmp_path / "s")}}
    change = {key: places[key][value] if key in places else value for key, value in change.items()}
    with pytest.raises(error):
        check_capture(make_config(capture_tree(made, tmp_path / "s", "top_p_k") | change), 1)


def test_a_finished_store_is_not_touched_for_scores(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "top_p_k", tmp_path / "s")
    tree = capture_tree(made, tmp_path / "s", "top_p_k", scores_output=str(tmp_path / "scores"))
    with pytest.raises(UsageError, match="megakd score"):
        check_capture(make_config(tree), 1)
    assert files(tmp_path / "s") == files(made["folder"] / "top_p_k")


@pytest.mark.parametrize("other", ["scores.json", "selection.json", "latest_checkpointed_iteration.txt"])
def test_the_folder_of_something_else(other: str, made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / other).write_text("{}")
    with pytest.raises(UsageError, match="a folder of its own"):
        check_capture(make_config(capture_tree(made, tmp_path / "s", "top_p_k")), 1)


def test_damaged_shards_are_dropped_and_made_anew(made: dict[str, Any], world: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / "top_p_k", folder)
    path = folder / "shards" / "00000003.rows"
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")
    (folder / "shards" / "00000005.json").unlink()
    with pytest.raises(CorruptError, match="drop-damaged"):
        check_capture(make_config(capture_tree(made, folder, "top_p_k")), 1)
    assert verify([str(folder), "--drop-damaged"]) == 5
    assert not path.exists() and (folder / "shards" / "00000004.rows").exists()
    assert world(1).run(run_capture, capture_tree(made, folder, "top_p_k")) == [0]
    assert files(folder) == files(made["folder"] / "top_p_k") and verify([str(folder)]) == 0


def test_scores_of_a_selection_are_refused_where_all_are_needed(
    made: dict[str, Any], world: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SelectionWriter(tmp_path / "selection") as writer:
        writer.append(np.arange(0, 60, dtype=np.int64))
        dataset = IndexedDataset(made["data"]).fingerprint
        writer.finish(packing="concat", seq_length=SEQ, num_samples=SAMPLES, dataset=dataset, rule={})
    more = {"selection": str(tmp_path / "selection"), "scores_output": str(tmp_path / "scores")}
    assert world(1).run(run_capture, capture_tree(made, tmp_path / "s", "samples", **more)) == [0]
    flags = ["--scores", f"teacher={tmp_path / 'scores'}", "--weights", "teacher=-1"]
    with pytest.raises(UsageError, match="scores of 60 of 118 samples"):
        select([*flags, "--output", str(tmp_path / "kept")])


def test_a_flipped_byte_is_found(made: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / "top_p_k", folder)
    assert verify_store(folder) == []
    path = folder / "shards" / "00000003.rows"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(bytes(damaged))
    assert len(verify_store(folder)) == 1
    store = LogitsStore(folder)
    inputs = ConcatSamples(IndexedDataset(made["data"]), SEQ).read(np.arange(SAMPLES))[:, :-1]
    bad = []
    for sample in range(SAMPLES):
        try:
            store.read(sample, inputs[sample])
        except CorruptError:
            bad.append(sample)
    assert len(bad) == 1 and 39 <= bad[0] < 52
    with pytest.raises(MismatchError):
        store.read(0, inputs[1])


def test_show_and_verify_know_a_store(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    shutil.copytree(made["folder"] / "top_p_k", folder)
    assert show([str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"{SAMPLES} of {SAMPLES} have targets" in told and "bytes a token" in told and "top_k" in told
    assert verify([str(folder)]) == 0
    path = folder / "shards" / "00000003.rows"
    path.write_bytes(bytes([*path.read_bytes()[:-1], 7]))
    assert verify([str(folder)]) == 5
    assert "00000003.rows" in capsys.readouterr().err

"""Models of one tokenizer and other numbers of rows: what lies behind the tokenizer's ids is padding for either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.score.score_runs import run_score
from runs import TOKENIZER, VOCAB, make_config, make_tree, one_step, run_training, write_dataset
from tokenizer_models import train_byte_bpe
from worlds import Worlds

from megakd.config.tree import from_dict, validate
from megakd.data.indexed.dataset import IndexedDataset
from megakd.data.samples.concat import ConcatSamples
from megakd.data.scores.artefact import Scores
from megakd.data.tokenizer import build_tokenizer
from megakd.errors import MismatchError
from megakd.logits.store import BatchRows, LogitsStore
from megakd.train.preflight import check_run

WIDE = 300  # rows of the teacher; the tokenizer has 251 ids
SEQ = 16


def run_capture(tree: dict[str, Any]) -> int:
    from megakd.pipeline.capture.preflight import CaptureConfig, check_capture
    from megakd.pipeline.capture.run import capture

    config = from_dict(CaptureConfig, tree)
    validate(config)
    return int(capture(config, check_capture(config, 1)))


def widen(folder: str) -> None:
    """Give the rows behind the tokenizer's ids weights that would take most of a softmax. Runs in a world."""
    from megakd.layout import ParallelConfig
    from megakd.model.checkpoint.record import read_record
    from megakd.parallel import init_parallel

    init_parallel(ParallelConfig(), seed=1)
    from megatron.core import dist_checkpointing

    record = read_record(folder)
    tensors = dist_checkpointing.load_plain_tensors(str(record.path))
    rows = next(value for key, value in tensors.items() if "word_embeddings" in key and "optimizer" not in key)
    assert rows.shape[0] >= WIDE and rows[VOCAB:WIDE].abs().min() > 0, "a leak of these would be seen"


@pytest.fixture(scope="module")
def made(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher of 300 rows, the same one cut to the tokenizer's 251 ids, and data with and without a tokenizer."""
    folder = tmp_path_factory.mktemp("vocabulary")
    data = write_dataset(folder / "data", num_tokens=1900)
    plain = write_dataset(folder / "plain", num_tokens=1900, tokenizer=None)  # type: ignore[arg-type]
    wide, cut = str(folder / "wide"), str(folder / "cut")
    tree = make_tree(data, data={"vocab_size": WIDE}, training={"train_iters": 20}, checkpoint={"save": wide})
    assert world(1).run(run_training, tree) == [0]
    world(1).run(widen, wide)
    still = {"lr": 1e-30, "weight_decay": 0.0}
    start = {"save": cut, "load": wide, "finetune": True}
    assert world(1).run(run_training, make_tree(data, training={"train_iters": 1}, optim=still, checkpoint=start)) == [
        0
    ]
    return {"folder": folder, "data": data, "plain": plain, "wide": wide, "cut": cut}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_wide_teacher_is_the_one_that_is_cut(made: dict[str, Any], world: Worlds, size: int) -> None:
    """In value and gradient; the one that is cut is held against the float64 twin elsewhere."""
    found = []
    for teacher in ("wide", "cut"):
        tree = make_tree(
            made["data"],
            teacher={"load": made[teacher]},
            objective={"kd_alpha": 0.7, "kd_divergence": "symmetric_kl"},
            parallel={"tensor_model_parallel_size": size},
        )
        found.append(world(size).run(one_step, tree)[0])
    for key in ("loss", "lm", "kd", "entropy", "grad_norm"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-6), key
    assert found[0]["kd"] > 0.01


@pytest.mark.slow
def test_scores_and_stores_are_over_the_tokenizers_ids(made: dict[str, Any], world: Worlds) -> None:
    scores, rows = [], []
    for model in ("wide", "cut"):
        base = {"load": made[model], "data_path": made["data"], "seq_length": SEQ, "bf16": False}
        scored, kept = made["folder"] / f"scores-{model}", made["folder"] / f"store-{model}"
        assert world(1).run(run_score, {**base, "output": str(scored), "packing": "concat", "mask_policy": "all"}) == [
            0
        ]
        assert world(1).run(run_capture, {**base, "output": str(kept), "top_k": 251, "top_p": 1.0}) == [0]
        scores.append(Scores(scored))
        store = LogitsStore(kept)
        assert store.spec.vocab_size == VOCAB
        ids = np.arange(store.spec.num_samples)
        rows.append(store.read_batch(ids, ConcatSamples(IndexedDataset(made["data"]), SEQ).read(ids)[:, :-1]))
    np.testing.assert_allclose(scores[0].log_probs, scores[1].log_probs, rtol=1e-6)
    np.testing.assert_array_equal(rows[0].ids_BSK, rows[1].ids_BSK)
    np.testing.assert_allclose(np.exp(rows[0].log_probs_BSK.astype(np.float64)).sum(2), 1, atol=1e-3)


def test_a_model_whose_tokenizer_nothing_records(made: dict[str, Any], world: Worlds) -> None:
    unnamed = str(made["folder"] / "unnamed")
    tree = make_tree(
        made["plain"], data={"vocab_size": WIDE}, training={"train_iters": 1}, checkpoint={"save": unnamed}
    )
    assert world(1).run(run_training, tree) == [0]
    with pytest.raises(MismatchError, match=f"vocabulary {WIDE}, the data's tokenizer has.*--vocab-size {VOCAB}"):
        check_run(make_config(make_tree(made["data"], teacher={"load": unnamed})), 1)
    stated = make_tree(made["data"], teacher={"load": unnamed}, data={"vocab_size": VOCAB})
    plan = check_run(make_config(stated), 1)
    assert plan.vocab_size == VOCAB and len(plan.warnings) == 1 and "the teacher" in plan.warnings[0]
    narrow = make_tree(made["data"], teacher={"load": made["cut"]}, data={"vocab_size": WIDE})
    with pytest.raises(MismatchError, match=f"vocabulary {VOCAB}, fewer than the {WIDE} ids"):
        check_run(make_config(narrow), 1)


def test_the_tokenizer_that_flags_name_counts(made: dict[str, Any], tmp_path: Path) -> None:
    """Data without a manifest and a teacher of another tokenizer; then a file that is not the data's."""
    folder = str(train_byte_bpe(tmp_path / "bpe", vocab_size=300))
    flags = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
    tree = make_tree(made["plain"], teacher={"load": made["cut"]}, data=flags)
    with pytest.raises(MismatchError, match="--tokenizer-type HuggingFaceTokenizer, and the teacher.*NullTokenizer"):
        check_run(make_config(tree), 1)
    own = build_tokenizer("HuggingFaceTokenizer", folder).describe()
    data = write_dataset(tmp_path / "bpe-data", num_tokens=1900, tokenizer={**own, "hash": "1" * 32})
    with pytest.raises(MismatchError, match="different tokenizers: --tokenizer-model .*dataset .*1111"):
        check_run(make_config(make_tree(data, data={"tokenizer_model": folder})), 1)
    plan = check_run(make_config(make_tree(made["plain"], data=flags)), 1)
    assert plan.tokenizer is not None and plan.tokenizer["hash"] == own["hash"] and not plan.warnings
    assert plan.vocab_size == own["vocab_size"]
    unknown = check_run(
        make_config(make_tree(made["plain"], teacher={"load": made["cut"]}, data={"vocab_size": 251})), 1
    )
    assert len(unknown.warnings) == 1 and made["plain"] in unknown.warnings[0]


def test_a_checkpoint_of_another_tokenizer(made: dict[str, Any], tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", num_tokens=1900, tokenizer={**TOKENIZER, "hash": "1" * 32})
    tree = make_tree(other, checkpoint={"load": made["cut"], "finetune": True})
    with pytest.raises(MismatchError, match="different tokenizers: dataset .*the checkpoint"):
        check_run(make_config(tree), 1)


def test_stored_rows_lose_the_ids_that_are_padding() -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([[[0.5, 0.25, 0.2], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], np.float32))
    ids = np.array([[[3, 252, 7], [1, 2, 900], [260, 0, 0]]])
    rows = BatchRows(ids, log_probs, np.ones((1, 3), np.float32), np.ones((1, 3), np.bool_))
    found = rows.within(VOCAB, conditional=True)
    np.testing.assert_allclose(
        np.exp(found.log_probs_BSK[0]), [[0.5 / 0.75, 0, 0.2 / 0.75], [0.5, 0.5, 0], [0, 0, 0]], rtol=1e-6
    )
    assert found.has_targets_BS.tolist() == [[True, True, False]]
    as_drawn = rows.within(VOCAB, conditional=False)
    np.testing.assert_allclose(np.exp(as_drawn.log_probs_BSK[0, 0]), [0.5, 0, 0.2], rtol=1e-6)
    assert rows.within(1000, conditional=True) is rows

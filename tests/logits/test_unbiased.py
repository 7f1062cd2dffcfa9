"""Draws are right on average by the time they are targets: a million of them, through the head, the store and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megakd.errors import UsageError
from megakd.logits.codec import (
    READ_AHEAD,
    Rounding,
    RowDecoder,
    RowEncoder,
    RowFormat,
    Rows,
    ValueBits,
    identity_ranks,
)
from megakd.logits.rounding import RandomRounding
from megakd.logits.spec import StoreSpec
from megakd.logits.store import BatchRows, LogitsStore
from megakd.logits.store_writer import finish_store, write_shard
from megakd.losses.vocab_parallel import VocabShard
from megakd.teachers.head_rows import RowReader, draw_numbers, token_positions

VOCAB, DRAWS, ROWS, SAMPLES = 41, 50, 1000, 20
STARTS = np.arange(SAMPLES) * ROWS


def _spec(exponent: float, bits: str = "8", seed: int = 1) -> StoreSpec:
    made = StoreSpec.rows(
        "samples", value_bits=bits, draws=DRAWS, top_k=0, top_p=1.0, seed=seed, proposal_exponent=exponent
    )
    return StoreSpec(
        **made,
        vocab_size=VOCAB,
        packing="concat",
        seq_length=ROWS,
        num_samples=SAMPLES,
        shard_samples=SAMPLES,
        parents={"dataset": "d" * 32, "model": "m" * 32},
    )


def _targets(spec: StoreSpec, logits_V: torch.Tensor, folder: Path) -> NDArray[np.float64]:
    """``[rows, VOCAB]``: the mass that each id of one distribution has in what a student reads, at every position."""
    shard = VocabShard(0, VOCAB, VOCAB, None)
    reader = RowReader(spec, shard=shard, implementation="auto", chunk_bytes=1 << 28)
    numbers_TN = torch.from_numpy(draw_numbers(STARTS, ROWS, spec)).flatten(0, 1)
    reading = reader.read(torch.ones(ROWS * SAMPLES, 1), logits_V.unsqueeze(1), uniforms_TN=numbers_TN)
    rows = reader.rows(reading, token_positions(STARTS, ROWS))
    ranks, input_ids = identity_ranks(VOCAB), np.zeros(ROWS, np.int64)
    writer = write_shard(folder, spec, ranks, 0)
    for sample in range(SAMPLES):
        own = slice(sample, None, SAMPLES)  # positions stand sequence first
        writer.add(sample, input_ids, Rows(rows.ids_TK[own], rows.log_probs_TK[own], rows.entropy_T[own]))
    writer.commit()
    finish_store(folder, spec, ranks)
    found = LogitsStore(folder).read_batch(np.arange(SAMPLES), np.zeros((SAMPLES, ROWS), np.int64))
    return _whole(found)


def _whole(found: BatchRows) -> NDArray[np.float64]:
    """``[rows, VOCAB]`` masses."""
    ids_TK = found.ids_BSK.reshape(ROWS * SAMPLES, -1)
    mass_TK = np.exp(found.log_probs_BSK.astype(np.float64)).reshape(ids_TK.shape)
    mass_TV = np.zeros((len(ids_TK), VOCAB))
    np.add.at(mass_TV, (np.arange(len(ids_TK))[:, None], ids_TK), mass_TK)
    return mass_TV


def _z_scores(mass_TV: NDArray[np.float64], logits_V: torch.Tensor) -> NDArray[np.float64]:
    """Standard scores of the mean over the rows, for ids with enough draws that it is near to normal."""
    p_V = logits_V.double().softmax(0).numpy()
    often_V = (mass_TV > 0).sum(0) > 1000
    error_V = mass_TV.std(0) / np.sqrt(len(mass_TV))
    assert often_V.sum() > 20
    scores: NDArray[np.float64] = ((mass_TV.mean(0) - p_V) / error_V)[often_V]
    return scores


@pytest.mark.slow
@pytest.mark.parametrize(("exponent", "bits"), [(0.5, "8"), (0.8, "8"), (1.2, "8"), (0.8, "16"), (1.0, "8")])
def test_a_million_draws_are_unbiased_in_the_store(exponent: float, bits: str, tmp_path: Path) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    scores = _z_scores(_targets(_spec(exponent, bits), logits_V, tmp_path), logits_V)
    assert np.abs(scores).max() < 4.5 and (scores**2).mean() < 1.8, scores


@pytest.mark.slow
def test_rounding_to_the_nearest_level_is_found(tmp_path: Path) -> None:
    """Draws rounded to the nearest level fail the test above, so that test can fail."""
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    scores = _z_scores(_targets_of_nearest(_spec(0.8), logits_V, tmp_path), logits_V)
    assert np.abs(scores).max() > 6


def _targets_of_nearest(spec: StoreSpec, logits_V: torch.Tensor, folder: Path) -> NDArray[np.float64]:
    """With the rounding of a store that says so, of rows that are not rounded."""
    floats = replace(spec, value_bits=32)
    exact_TV = _targets(floats, logits_V, folder / "exact")
    levels = replace(spec, rounding="nearest")
    ranks = identity_ranks(VOCAB)
    writer = write_shard(folder, levels, ranks, 0)
    with np.errstate(divide="ignore"):
        log_TV = np.log(exact_TV).astype(np.float32)
    ids_TV = np.broadcast_to(np.arange(VOCAB), (ROWS, VOCAB))
    for sample in range(SAMPLES):
        own = slice(sample * ROWS, (sample + 1) * ROWS)
        writer.add(sample, np.zeros(ROWS, np.int64), Rows(ids_TV, log_TV[own], np.ones(ROWS, np.float32)))
    writer.commit()
    finish_store(folder, levels, ranks)
    found = LogitsStore(folder).read_batch(np.arange(SAMPLES), np.zeros((SAMPLES, ROWS), np.int64))
    return _whole(found)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_rounded_mass_is_stored_as_it_is(bits: ValueBits) -> None:
    """Rounded weights are levels: neither the store nor rounding again changes them."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(VOCAB)[:9] for _ in range(200)])
    log_masses = rng.uniform(-40, np.log(64), ids.shape)
    rounding = RandomRounding(np.arange(200), bits, 7, "x")
    once = rounding.round(log_masses, ids)
    np.testing.assert_allclose(rounding.round(once, ids), once, rtol=0, atol=1e-9)
    rows = Rows(ids.astype(np.int64), once.astype(np.float32), np.ones(200, np.float32))
    row_format = RowFormat("samples", bits, draws=9, weighted=True, rounding="random")
    found = _round_trip(row_format, rows)
    for row in range(200):
        order = np.argsort(ids[row])
        np.testing.assert_allclose(found.log_probs_TK[row], once[row][order], rtol=0, atol=1e-5)


def _round_trip(row_format: RowFormat, rows: Rows) -> Rows:
    encoder = RowEncoder(row_format, identity_ranks(VOCAB))
    encoder.add(rows)
    encoded = encoder.finish()
    record = encoded.payload[: int(encoded.offsets[1]) + READ_AHEAD]
    return RowDecoder(row_format, identity_ranks(VOCAB), encoded.code_lengths).decode(record)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("log_mass", [-49.5, -40.0, -10.0, -1.3, 0.0, 2.0, np.log(64)])
def test_any_mass_is_right_on_average(bits: ValueBits, log_mass: float) -> None:
    """Down to below the least level, where most roundings leave nothing."""
    count = 40_000
    rounding = RandomRounding(np.arange(count), bits, 1, "x")
    found = np.exp(rounding.round(np.full((count, 1), log_mass), np.full((count, 1), 5)))
    error = found.std() / np.sqrt(count) + 1e-9 * np.exp(log_mass)
    assert abs(found.mean() - np.exp(log_mass)) < 4.5 * error


def test_rounding_depends_on_seed_dataset_position_and_id_alone() -> None:
    ids, masses = np.array([[5, 9, 3]] * 4), np.full((4, 3), -3.0)
    positions = np.array([0, 7, 2**40, 3])

    def rounded(positions: NDArray[np.int64], seed: int = 1, dataset: str = "x") -> NDArray[np.float64]:
        return RandomRounding(positions, 8, seed, dataset)._uniforms(ids)

    whole = rounded(positions)
    assert len(np.unique(whole)) == 12
    np.testing.assert_array_equal(rounded(positions[::-1])[::-1], whole)
    swapped = RandomRounding(positions, 8, 1, "x").round(masses[:, ::-1], ids[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(swapped, RandomRounding(positions, 8, 1, "x").round(masses, ids))
    assert not (rounded(positions, seed=2) == whole).any() and not (rounded(positions, dataset="y") == whole).any()


def test_random_rounding_is_of_weighted_draws() -> None:
    made = StoreSpec.rows("samples", value_bits="8", draws=9, top_k=0, top_p=1.0, seed=0, proposal_exponent=0.8)
    assert made["rounding"] == "random"
    for wrong in (RowFormat("samples", draws=9), RowFormat("top_p_k")):
        with pytest.raises(UsageError, match="expected nearest, or random for weighted draws"):
            replace(wrong, rounding="random")
    rounding: Rounding = "nearest"
    assert RowFormat("samples", draws=9, weighted=True, rounding=rounding).mass == "stored"  # stores of before

"""The row codec: ids and counts exact, values within their bound, the same as its twin, unharmed by damaged bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logits import codec_twin as twin
from logits.rows import as_dicts, random_counts, random_rows
from numpy.typing import NDArray

from megakd.errors import CorruptError, UsageError
from megakd.logits.codec import (
    ENTROPY_STEP,
    MAX_ENTROPY,
    READ_AHEAD,
    TAIL_STEP,
    EncodedRows,
    RowDecoder,
    RowEncoder,
    RowFormat,
    Rows,
    ValueBits,
    identity_ranks,
    invert,
    rank_by_frequency,
)

VOCABULARIES = (251, 32000, 65536, 131073, 151936, 262144)
TOP_P_K, FINE, FLOATS = (RowFormat("top_p_k", bits) for bits in (8, 16, 32))
RENORMALISED, SAMPLES = RowFormat("renormalised_samples"), RowFormat("samples", draws=50)


def random_ranks(vocab_size: int) -> NDArray[np.int32]:
    return np.random.default_rng(vocab_size).permutation(vocab_size).astype(np.int32)


def encode(
    row_format: RowFormat, ranks: NDArray[np.int32], *samples: Rows | None, rows_for_codes: int = 65536
) -> EncodedRows:
    encoder = RowEncoder(row_format, ranks, rows_for_codes=rows_for_codes)
    for rows in samples:
        encoder.add(rows)
    return encoder.finish()


def record(encoded: EncodedRows, sample: int = 0) -> NDArray[np.uint8]:
    return encoded.payload[int(encoded.offsets[sample]) : int(encoded.offsets[sample + 1]) + READ_AHEAD]


def decode(row_format: RowFormat, ranks: NDArray[np.int32], encoded: EncodedRows, sample: int = 0) -> Rows:
    return RowDecoder(row_format, invert(ranks), encoded.code_lengths).decode(record(encoded, sample))


def round_trip(row_format: RowFormat, ranks: NDArray[np.int32], rows: Rows) -> Rows:
    return decode(row_format, ranks, encode(row_format, ranks, rows))


def mass(rows: Rows) -> NDArray[np.float64]:
    return np.exp(rows.log_probs_TK.astype(np.float64)).sum(1)


def bound(log_prob: float, bits: int) -> float:
    """Largest error of a log-probability before the row is shifted: half a step of the eighth root."""
    half = 0.5 / 128 if bits == 8 else 0.5 / 128 / 256
    root = np.exp(log_prob / 8)
    return float(-8 * np.log(1 - half / root)) + 2e-6


def check_values(rows: Rows, found: Rows, bits: int) -> None:
    """Ids exact, values within the bound of the value and of the row's shift, entropies within half a step."""
    for before, after, row_mass in zip(as_dicts(rows), as_dicts(found), mass(rows).tolist()):
        assert before.keys() == after.keys()
        if not before:
            continue
        # the shift is at most the average of the errors by mass, and what the stored mass is off
        off = [np.exp(x + bound(x, bits)) for x in before.values()]
        shift = np.log(sum(off) / row_mass) + TAIL_STEP
        for token, value in before.items():
            assert abs(after[token] - value) <= bound(value, bits) + shift, (token, value, after[token])
    np.testing.assert_allclose(found.entropy_T, rows.entropy_T, rtol=0, atol=ENTROPY_STEP / 2 + 1e-6)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("ranks_of", [identity_ranks, random_ranks])
def test_round_trip(vocab_size: int, ranks_of) -> None:
    ranks = ranks_of(vocab_size)
    rows = random_rows(vocab_size, 40, vocab_size, 60)
    for bits, row_format in ((8, TOP_P_K), (16, FINE)):
        check_values(rows, round_trip(row_format, ranks, rows), bits)
    assert as_dicts(round_trip(FLOATS, ranks, rows)) == as_dicts(rows)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_weighted_draws_may_weigh_more_than_one(bits: ValueBits) -> None:
    rows = random_rows(251, 40, 251, 60)
    heavy = replace(rows, log_probs_TK=rows.log_probs_TK + np.linspace(-2, 4, 40, dtype=np.float32)[:, None])
    assert mass(heavy).max() > 30
    found = round_trip(RowFormat("samples", bits, draws=50, weighted=True), random_ranks(251), heavy)
    tolerance = {8: 0.2, 16: 2e-3, 32: 1e-5}[bits]  # of an id that has a thousandth of the mass
    for before, after in zip(as_dicts(heavy), as_dicts(found)):
        assert before.keys() == after.keys()
        for token, value in before.items():
            if value > np.log(1e-3):
                assert abs(after[token] - value) < tolerance
    np.testing.assert_allclose(mass(found), mass(heavy), rtol=TAIL_STEP)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_counts_are_exact(vocab_size: int) -> None:
    ids, counts = random_counts(1, 60, vocab_size, 50)
    rows = Rows.from_counts(ids, counts, np.zeros(60, np.float32), draws=50)
    found = round_trip(SAMPLES, random_ranks(vocab_size), rows)
    drawn = found.counts(50)
    assert (drawn.sum(1) == 50).all()
    before = [dict(zip(i[c > 0].tolist(), c[c > 0].tolist())) for i, c in zip(ids, counts)]
    assert before == [dict(zip(i[c > 0].tolist(), c[c > 0].tolist())) for i, c in zip(found.ids_TK, drawn)]
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(found.log_probs_TK, np.log(drawn / 50).astype(np.float32))


@pytest.mark.parametrize(
    "row_format", [TOP_P_K, FINE, FLOATS, RENORMALISED, SAMPLES], ids=lambda f: f"{f.kind}{f.value}"
)
@pytest.mark.parametrize("rows_for_codes", [65536, 5])
def test_the_twin_reads_the_same(row_format: RowFormat, rows_for_codes: int) -> None:
    ranks = random_ranks(1000)
    samples = [random_rows(seed, 6, 1000, width) for seed, width in enumerate((30, 1, 300))]
    if row_format.kind == "samples":
        drawn = [random_counts(seed, 6, 1000, 50) for seed in range(3)]
        samples = [Rows.from_counts(i, c, np.arange(6, dtype=np.float32), draws=50) for i, c in drawn]
    if row_format.kind == "renormalised_samples":
        with np.errstate(divide="ignore"):
            samples = [
                Rows(r.ids_TK, r.log_probs_TK - np.log(mass(r).clip(1e-300)).astype(np.float32)[:, None], r.entropy_T)
                for r in samples
            ]
    encoded = encode(row_format, ranks, *samples, rows_for_codes=rows_for_codes)
    for sample in range(3):
        found = decode(row_format, ranks, encoded, sample)
        expected = twin.decode(
            record(encoded, sample)[:-READ_AHEAD].tobytes(),
            encoded.code_lengths,
            invert(ranks),
            value=row_format.value,
            mass=row_format.mass,
            draws=row_format.draws,
        )
        assert len(expected) == found.num_rows
        for (values, entropy), after, found_entropy in zip(expected, as_dicts(found), found.entropy_T.tolist()):
            assert list(values) == list(after)
            assert list(after.values()) == pytest.approx(list(values.values()), abs=1e-5)
            assert found_entropy == entropy


def test_the_mass_of_a_row_is_kept() -> None:
    for shares in (1.0, 0.95, 0.5, 0.1, 1e-3, 1e-8):
        plain = random_rows(3, 20, 5000, 40, ragged=False)
        shift = np.log(shares / mass(plain)).astype(np.float32)
        rows = Rows(plain.ids_TK, plain.log_probs_TK + shift[:, None], plain.entropy_T)
        for row_format in (TOP_P_K, FINE):
            found = mass(round_trip(row_format, identity_ranks(5000), rows))
            np.testing.assert_allclose(found, shares, rtol=TAIL_STEP / 2 + 1e-6)
            np.testing.assert_allclose(1 - found, 1 - shares, rtol=TAIL_STEP / 2, atol=2e-6)


def test_the_mean_kl_of_rows_is_small() -> None:
    """KL of the K + 1 buckets is small; a real teacher's is in benchmarks/bench_store.py."""
    rows = random_rows(5, 300, 32000, 100, ragged=False)
    found = round_trip(TOP_P_K, random_ranks(32000), rows)
    kl = []
    for before, after in zip(as_dicts(rows), as_dicts(found)):
        p, q = np.exp(list(before.values())), np.exp([after[token] for token in before])
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        kl.append((p * np.log(p / q)).sum())
    assert 0 < np.mean(kl) < 1e-3


def test_values_keep_their_order() -> None:
    rows = random_rows(9, 50, 4000, 80, ragged=False)
    for row_format in (TOP_P_K, FINE):
        for before, after in zip(as_dicts(rows), as_dicts(round_trip(row_format, identity_ranks(4000), rows))):
            ordered = [after[token] for token in sorted(before, key=before.__getitem__)]
            assert ordered == sorted(ordered)


def test_one_id_all_ids_no_id() -> None:
    ranks = random_ranks(251)
    everything = random_rows(1, 4, 251, 251, ragged=False)
    one = Rows(np.array([[250]]), np.array([[0.0]], np.float32), np.array([0.0], np.float32))
    unlikely = Rows(np.array([[7]]), np.array([[-80.0]], np.float32), np.array([5.0], np.float32))
    none = Rows(np.zeros((3, 0), np.int64), np.zeros((3, 0), np.float32), np.full(3, MAX_ENTROPY, np.float32))
    for bits, row_format in ((8, TOP_P_K), (16, FINE), (32, FLOATS)):
        encoded = encode(row_format, ranks, everything, None, one, none, unlikely)
        assert encoded.offsets[1] == encoded.offsets[2]  # without targets: no record
        if bits == 32:
            assert as_dicts(decode(row_format, ranks, encoded)) == as_dicts(everything)
        else:
            check_values(everything, decode(row_format, ranks, encoded), bits)
        assert as_dicts(decode(row_format, ranks, encoded, 2)) == [{250: pytest.approx(0, abs=1e-6)}]
        assert as_dicts(decode(row_format, ranks, encoded, 3)) == [{}, {}, {}]
        np.testing.assert_array_equal(decode(row_format, ranks, encoded, 3).entropy_T, np.float32(MAX_ENTROPY))
        assert as_dicts(decode(row_format, ranks, encoded, 4))[0].keys() == {7}


def test_empty_slots_may_stand_anywhere() -> None:
    nothing = -np.inf
    log_probs = np.array([[-0.75, nothing, -1.5, nothing, -2.25]], np.float32)
    found = round_trip(FLOATS, identity_ranks(6), Rows(np.array([[5, -9, 3, 5, 1]]), log_probs, np.ones(1, np.float32)))
    assert found.ids_TK.tolist() == [[1, 3, 5]] and found.log_probs_TK.tolist() == [[-2.25, -1.5, -0.75]]


def test_fewer_bits_where_ids_are_frequent() -> None:
    rows = random_rows(2, 200, 50000, 50, ragged=False)
    counts = np.bincount(rows.ids_TK.ravel(), minlength=50000)
    small, large = (len(encode(TOP_P_K, r, rows).payload) for r in (rank_by_frequency(counts), random_ranks(50000)))
    assert small < 0.9 * large


def test_codes_for_the_first_rows_hold_for_the_rest() -> None:
    """Numbers that the first rows did not have can be written: wider rows, other levels, gaps of any size."""
    first, rest = random_rows(1, 10, 3000, 20), random_rows(2, 10, 3000, 700, sharpness=5)
    encoded = encode(TOP_P_K, identity_ranks(3000), first, rest, first, rows_for_codes=10)
    check_values(rest, decode(TOP_P_K, identity_ranks(3000), encoded, 1), 8)
    assert (record(encoded, 0)[:-READ_AHEAD] == record(encoded, 2)[:-READ_AHEAD]).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_row_comes_back(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(1, 2**18), label="vocab_size")
    ids = data.draw(st.lists(st.integers(0, vocab_size - 1), unique=True, max_size=300), label="ids")
    shares = np.array(data.draw(st.lists(st.floats(1e-30, 1), min_size=len(ids), max_size=len(ids)), label="shares"))
    shares = np.log(shares / max(shares.sum(), 1)).astype(np.float32)
    rows = Rows(np.array([ids], np.int64), shares[None].astype(np.float32), np.zeros(1, np.float32))
    for row_format in (TOP_P_K, FINE, FLOATS):
        found = as_dicts(round_trip(row_format, identity_ranks(vocab_size), rows))[0]
        assert found.keys() == set(ids)
        if row_format is FLOATS:
            assert found == dict(zip(ids, shares.tolist()))


@pytest.mark.parametrize(
    "ids, log_probs, entropy, message",
    [
        ([3, 3], [-1.0, -1.0], 1.0, "id 3 is there twice"),
        ([3, 10], [-1.0, -1.0], 1.0, "id 10 of 10"),
        ([3, -1], [-1.0, -1.0], 1.0, "id -1 of 10"),
        ([3, 4], [-1.0, float("nan")], 1.0, "id 4 has log-probability"),
        ([3, 4], [-9.0, 0.1], 1.0, "id 4 has log-probability"),
        ([3, 4], [-0.1, -0.1], 1.0, "the ids carry 1.8"),
        ([3, 4], [-1.0, -1.0], 33.0, "entropy 33"),
        ([3, 4], [-1.0, -1.0], float("nan"), "entropy"),
    ],
)
def test_rows_that_cannot_be_stored(ids, log_probs, entropy, message: str) -> None:
    encoder = RowEncoder(TOP_P_K, identity_ranks(10))
    good = Rows(np.array([[1]]), np.array([[-1.0]], np.float32), np.array([1.0], np.float32))
    encoder.add(good)
    two = Rows(np.array([[1, 2], ids]), np.array([[-1, -1], log_probs], np.float32), np.array([1, entropy], np.float32))
    with pytest.raises(UsageError, match=f"row 1: .*{message}"):
        encoder.add(two)
    encoder.add(good)  # nothing of the other was taken
    encoded = encoder.finish()
    assert (encoded.payload == encode(TOP_P_K, identity_ranks(10), good, good).payload).all()


def test_what_is_no_format_and_what_are_no_counts() -> None:
    with pytest.raises(UsageError, match="value_bits 7"):
        RowFormat("top_p_k", 7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="draws 0"):
        RowFormat("samples")
    with pytest.raises(UsageError, match="each of 0 to 2 once"):
        RowEncoder(TOP_P_K, np.array([0, 2, 2], np.int32))
    entropy = np.zeros(1, np.float32)
    off = Rows(np.array([[1, 2]]), np.log(np.array([[0.5, 0.5055]], np.float32)), entropy)
    with pytest.raises(UsageError, match="no multiple of 1/50"):
        encode(SAMPLES, identity_ranks(5), off)
    with pytest.raises(UsageError, match="49 draws, expected 50"):
        encode(
            SAMPLES, identity_ranks(5), Rows.from_counts(np.array([[1]]), np.array([[49]], np.int32), entropy, draws=50)
        )
    with pytest.raises(UsageError, match="carry 0.5.* expected 1"):
        encode(RENORMALISED, identity_ranks(5), Rows(np.array([[1]]), np.log(np.float32([[0.5]])), entropy))


@pytest.mark.parametrize("row_format", [TOP_P_K, FINE, FLOATS, SAMPLES], ids=lambda f: f.value)
def test_damaged_records_are_refused_or_read_as_rows(row_format: RowFormat) -> None:
    """Whatever bytes there are, nothing outside of the record or the arrays is touched; most damage is found."""
    rng = np.random.default_rng(0)
    ranks = identity_ranks(300)
    rows = random_rows(4, 12, 300, 40)
    if row_format.kind == "samples":
        rows = Rows.from_counts(*random_counts(4, 12, 300, 50), np.ones(12, np.float32), draws=50)
    encoded = encode(row_format, ranks, rows)
    decoder = RowDecoder(row_format, invert(ranks), encoded.code_lengths)
    whole = record(encoded).copy()
    refused = 0
    for _ in range(600):
        damaged = whole.copy()
        where = rng.integers(0, len(whole) - READ_AHEAD, rng.integers(1, 5))
        damaged[where] ^= rng.integers(1, 256, len(where)).astype(np.uint8)
        if rng.random() < 0.2:
            cut = int(rng.integers(0, len(whole)))
            damaged = damaged[: max(cut, READ_AHEAD)]
        out = np.full((12, 60), -7), np.full((12, 60), np.float32(7)), np.full(12, np.float32(7))
        guarded = [np.concatenate([array.ravel(), array.ravel()]) for array in out]
        views = [array[: len(array) // 2].reshape(mine.shape) for array, mine in zip(guarded, out)]
        try:
            decoder.decode_into(damaged, Rows(*views))
        except CorruptError:
            refused += 1
        for array, mine in zip(guarded, out):
            assert (array[len(array) // 2 :] == mine.ravel()).all()
    assert refused > (100 if row_format is FLOATS else 300)


def test_records_cut_anywhere_are_refused() -> None:
    rows = random_rows(4, 5, 300, 40)
    encoded = encode(TOP_P_K, identity_ranks(300), rows)
    decoder = RowDecoder(TOP_P_K, identity_ranks(300), encoded.code_lengths)
    whole = record(encoded)
    for cut in range(1, len(whole)):
        with pytest.raises(CorruptError):
            decoder.decode(whole[:-cut])
    with pytest.raises(CorruptError, match="row 0"):
        decoder.decode_into(whole, Rows(*(array[:4] for array in vars(decoder.decode(whole)).values())))


def test_code_lengths_of_no_code_are_refused() -> None:
    lengths = encode(TOP_P_K, identity_ranks(300), random_rows(4, 50, 300, 40)).code_lengths
    used = np.flatnonzero((lengths > 0) & (lengths < 11))
    for place, value in ((used[0], 0), (used[-1], lengths[used[-1]] - 1), (used[3], 11), (used[3], 255)):
        wrong = lengths.copy()
        wrong[place] = value
        with pytest.raises(CorruptError, match="no code"):
            RowDecoder(TOP_P_K, identity_ranks(300), wrong)
